"""Large networks by name, networks cut from them, and files of seeded values in their layouts."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from raywgen.tasks import build_network
from raywgen.tasks.networks.vit import VisionTransformer
from raywgen.weights import Layout, StateDict
from raywgen.weights.safetensors_stream import StreamedTensor, save_streamed

Model = Literal["small", "resnet101", "vit_large", "billion"]
MODELS: dict[Model, Callable[[], nn.Module]] = {
    "small": partial(VisionTransformer, 64, 3, 4, 10, image_size=32, patch_size=8),
    "resnet101": partial(build_network, {"name": "resnet101"}),
    "vit_large": partial(build_network, {"name": "vit-l"}),
    "billion": partial(build_network, {"name": "mlp", "widths": [15_811] * 5}),
}
"""Builds each model; the names and shapes of tensors are torchvision's for the ResNet, timm's for the ViT."""
_VALUES_AT_ONCE = 1 << 20


def empty_module(model: Model) -> nn.Module:
    """Builds a model without values."""
    with torch.device("meta"):
        return MODELS[model]()


def cut(state: StateDict, num_values: int) -> StateDict:
    """Returns the first tensors of a network, without values, up to a number of values.

    Of the tensor that reaches that number the first rows are kept, at least one.

    Args:
        state: The network, on the meta device.
        num_values: Number of floating-point values.
    """
    kept, left = {}, num_values
    for name, tensor in state.items():
        if left <= 0:
            break
        if tensor.is_floating_point():
            row = math.prod(tensor.shape[1:])
            tensor = tensor[: max(1, left // row)]
            left -= tensor.numel()
        kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return kept


def write_seeded(state: StateDict, path: Path) -> Layout:
    """Writes a network of seeded values as a safetensors file and returns its layout; no tensor is held whole.

    A file that is there already is kept: it was written in one step.

    Args:
        state: Names, shapes and dtypes; the values are not read.
        path: The file.

    Raises:
        WeightsError: The file cannot be written.
    """
    tensors = {
        name: StreamedTensor(tensor.dtype, tuple(tensor.shape), partial(_blocks, name, tensor))
        for name, tensor in state.items()
    }
    if not path.is_file():
        save_streamed(tensors, path, {})
    return Layout.from_state_dict(state)


def _blocks(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """Yields values as a trained network might have them: small weights, and scales and variances about one."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    is_scale = tensor.dim() == 1 and not name.endswith(("bias", "running_mean"))
    deviation = 0.1 if tensor.dim() < 2 else math.prod(tensor.shape[1:]) ** -0.5
    for start in range(0, tensor.numel(), _VALUES_AT_ONCE):
        num = min(_VALUES_AT_ONCE, tensor.numel() - start)
        if not tensor.is_floating_point():
            yield torch.zeros(num, dtype=tensor.dtype)
        else:
            values = deviation * torch.randn(num, generator=generator)
            yield ((1 + values).abs() if is_scale else values).to(tensor.dtype)
