"""The entries of a layout: name, shape, dtype and kind of each tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.json_types import JsonObject
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
        name: Key in the `state_dict`.
        shape: Shape of the tensor.
        dtype: Name of the dtype in torch, such as `float32`.
        kind: One of `KINDS`.
        tied_to: Name under which the same tensor is stored; empty for a tensor with values of its own.
        is_constant: Whether the architecture fixes its values (a causal mask, for instance), so that they are copied
            instead of generated.
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
        """The dtype as an object of torch."""
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Number of bytes in the packed form, without alignment; 0 for a tied tensor."""
        return 0 if self.tied_to else math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def is_generated(self) -> bool:
        """Whether a generator writes this tensor.

        Integer and bool tensors (counters), constants, and formats that torch cannot compute with are only stored.
        """
        return not self.tied_to and not self.is_constant and _is_computed(self.torch_dtype)

    @property
    def real_shape(self) -> tuple[int, ...]:
        """Shape of the real values: complex tensors have a last dimension of two."""
        return (*self.shape, 2) if self.torch_dtype.is_complex else self.shape

    def to_json(self) -> JsonObject:
        """Returns the entry as a JSON object."""
        row: JsonObject = {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "kind": self.kind,
        }
        if self.tied_to:
            row["tied_to"] = self.tied_to
        return row | ({"is_constant": True} if self.is_constant else {})


def kind_of(name: str, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns the kind of a tensor, one of `KINDS`, by its name and the shapes of its neighbours."""
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
    """Returns the real values of a tensor: complex ones as pairs along a new last dimension."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def find_ties(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Finds names that share memory and shape with an earlier name; returns that name for each."""
    first: dict[tuple[object, ...], str] = {}
    ties = {}
    for name, tensor in state_dict.items():
        if tensor.layout != torch.strided or tensor.is_nested or not tensor.numel():
            continue
        # A storage has an identity even without memory, as on the device "meta".
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if (owner := first.setdefault(place, name)) != name:
            ties[name] = owner
    return ties


def is_mask(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a mask, by its name and values; never on the device "meta", which has no values."""
    if not tensor.is_floating_point() or tensor.is_meta or not may_be_mask(name) or not _is_computed(tensor.dtype):
        return False
    values_X = tensor.detach().reshape(-1)
    return bool(masks((values_X if tensor.dtype == torch.float64 else values_X.float()).unsqueeze(0)))


def _is_computed(dtype: torch.dtype) -> bool:
    # Two 4-bit values in a byte: torch stores them, and cannot convert them.
    return (dtype.is_floating_point or dtype.is_complex) and dtype != torch.float4_e2m1fn_x2
