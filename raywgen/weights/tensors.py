"""What a layout knows of one tensor, and how its values count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raywgen.weights.masks import masks, may_be_mask

StateDict = dict[str, Tensor]

KINDS = (
    "weight",
    "bias",
    "norm_scale",
    "norm_shift",
    "running_mean",
    "running_var",
    "embedding",
    "counter",
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a layout.

    Attributes:
        name: Its key.
        shape: Its shape.
        dtype: Its dtype as torch names it, such as `float32`.
        kind: One of `KINDS`.
        tied_to: Name of the tensor that is this very one under another name; empty for a tensor of its own.
        is_constant: The architecture fixes its values (a causal mask, for instance): they are copied, not generated.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    tied_to: str = ""
    is_constant: bool = False

    @property
    def num_values(self) -> int:
        """Number of real values: a complex one counts as two."""
        return math.prod(self.shape) * (2 if self.torch_dtype.is_complex else 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes of the packed form, without alignment; a tied one takes none."""
        return 0 if self.tied_to else math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def is_generated(self) -> bool:
        """Whether a generator writes this tensor.

        Integer and bool tensors (counters), constants, and formats that torch cannot compute with are only kept.
        """
        return not self.tied_to and not self.is_constant and _is_computed(self.torch_dtype)

    @property
    def real_shape(self) -> tuple[int, ...]:
        """The shape of its real values: complex ones have a last dimension of two."""
        return (*self.shape, 2) if self.torch_dtype.is_complex else self.shape

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        row: dict[str, Any] = {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "kind": self.kind}
        if self.tied_to:
            row["tied_to"] = self.tied_to
        return row | ({"is_constant": True} if self.is_constant else {})


def kind_of(name: str, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a tensor is, by its name and those beside it; one of `KINDS`."""
    if not dtype.is_floating_point and not dtype.is_complex:
        return "counter"
    prefix, _, leaf = name.rpartition(".")
    if leaf in ("running_mean", "running_var"):
        return leaf
    owner = shapes.get(f"{prefix}.weight" if prefix else "weight", ())
    if leaf == "bias":
        return "norm_shift" if len(owner) == 1 else "bias"
    if len(shapes[name]) == 1:
        return "norm_scale" if leaf == "weight" else "bias"
    return "embedding" if "embed" in name else "weight"


def real_values(tensor: Tensor) -> Tensor:
    """The real values of a tensor: complex ones as pairs along a new last dimension."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def find_ties(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is that of an earlier name: all of the same place in memory, in the same shape."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in state_dict.items():
        if tensor.layout != torch.strided or tensor.is_nested or not tensor.numel():
            continue
        # A storage has an identity where it has no memory, too, as on the device "meta".
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if (owner := first.setdefault(place, name)) != name:
            ties[name] = owner
    return ties


def is_mask(name: str, tensor: Tensor) -> bool:
    """Whether a tensor holds a mask by its name and values; none on the device "meta", which has no values."""
    if not tensor.is_floating_point() or tensor.is_meta or not may_be_mask(name) or not _is_computed(tensor.dtype):
        return False
    values_X = tensor.detach().reshape(-1)
    return bool(masks((values_X if tensor.dtype == torch.float64 else values_X.float()).unsqueeze(0)))


def _is_computed(dtype: torch.dtype) -> bool:
    # Two values of 4 bits in a byte: torch stores them, and converts them to nothing.
    return (dtype.is_floating_point or dtype.is_complex) and dtype != torch.float4_e2m1fn_x2
