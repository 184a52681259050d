"""Random changes of image batches, keyed by seed and step so that any step can be made again.

Shape legend: T images of a minibatch, C channels, H height, W width.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from torch.nn import functional

from raywgen.tasks.base import TaskError

_STEP_STRIDE = 1 << 20


def augment(x: Tensor, kind: str, channels: int, seed: int, step: int) -> Tensor:
    """Changes a batch of square images.

    Args:
        x: `(T, C * H * W)` or `(T, C, H, W)`.
        kind: `flip`, `shift-K`, both joined by `+`, or empty for no change.
        channels: C.
        seed: Seed of the run.
        step: Step of the run.

    Raises:
        TaskError: The kind is unknown, or flattened samples are no square images.
    """
    if not kind:
        return x
    side = math.isqrt(x[0].numel() // channels)
    if channels * side * side != x[0].numel():
        raise TaskError(f"augment={kind}: samples of {x[0].numel()} values are no square images of {channels} channels")
    images_TCHW = x.reshape(len(x), channels, side, side)
    generator = torch.Generator().manual_seed(seed * _STEP_STRIDE + step)
    for part in kind.split("+"):
        images_TCHW = _change(images_TCHW, part, generator)
    return images_TCHW.reshape(x.shape)


def _change(images_TCHW: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    num = len(images_TCHW)
    if kind == "flip":
        mask_T = torch.rand(num, generator=generator) < 0.5
        return torch.where(mask_T.view(-1, 1, 1, 1), images_TCHW.flip(-1), images_TCHW)
    match = re.fullmatch(r"shift-(\d+)", kind)
    if match is None:
        raise TaskError(f"augment: unknown kind '{kind}'; give flip, shift-K, or both joined by +")
    reach = int(match.group(1))
    side = images_TCHW.shape[-1]
    padded = functional.pad(images_TCHW, [reach] * 4)
    offset_T2 = torch.randint(2 * reach + 1, (num, 2), generator=generator)
    span = torch.arange(side)
    rows = (offset_T2[:, :1] + span).view(num, 1, side, 1)
    columns = (offset_T2[:, 1:] + span).view(num, 1, 1, side)
    samples = torch.arange(num).view(-1, 1, 1, 1)
    channels = torch.arange(images_TCHW.shape[1]).view(1, -1, 1, 1)
    return padded[samples, channels, rows, columns]
