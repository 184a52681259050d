"""How one architecture's `state_dict` lies in a flat vector, and in bytes.

Shape legend: N networks, D values of the flat vector, P bytes of the packed form.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from raywgen.weights.errors import LayoutMismatchError, NonFiniteWeightsError, WeightsError

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
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a layout: its key, shape, dtype name (`float32`, `int64`, ...) and kind."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str

    @property
    def num_values(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's own values, without alignment."""
        return self.num_values * self.torch_dtype.itemsize

    @property
    def is_generated(self) -> bool:
        """Whether a generator writes this tensor; integer and bool tensors (counters) are only kept."""
        return self.torch_dtype.is_floating_point


@dataclass(frozen=True)
class Layout:
    """An ordered table of tensors.

    The **flat vector** holds the values of all floating-point tensors as float32, one after another in
    `state_dict` order; it is what a generator sees. The **packed form** holds every tensor's own bytes, each
    starting at a multiple of 8; it is what a corpus stores, so that dtypes and counters come back bit for bit.
    """

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> Self:
        """Reads names, shapes, dtypes and kinds from a `state_dict`.

        Raises:
            WeightsError: It is empty, or an entry is no tensor.
        """
        if not state_dict:
            raise WeightsError("the state_dict is empty; give one with at least one tensor")
        for name, tensor in state_dict.items():
            if not isinstance(tensor, Tensor):
                raise WeightsError(f"entry '{name}' is a {type(tensor).__name__}, not a tensor; remove it")
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        return cls(
            tuple(
                TensorSpec(
                    name=name,
                    shape=shapes[name],
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    kind=kind_of(name, tensor.is_floating_point(), shapes),
                )
                for name, tensor in state_dict.items()
            )
        )

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> Self:
        """Inverse of `to_json`."""
        return cls(tuple(TensorSpec(**{**row, "shape": tuple(row["shape"])}) for row in rows))

    def to_json(self) -> list[dict[str, Any]]:
        """One JSON object per tensor."""
        return [
            {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype, "kind": spec.kind}
            for spec in self.tensors
        ]

    @cached_property
    def id(self) -> str:
        """Content hash: equal layouts have equal ids."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def generated(self) -> tuple[TensorSpec, ...]:
        """The tensors in the flat vector, in order."""
        return tuple(spec for spec in self.tensors if spec.is_generated)

    @cached_property
    def dtype(self) -> str:
        """Of the generated tensors; `mixed` where they differ, `none` where there are none."""
        dtypes = {spec.dtype for spec in self.generated}
        return "none" if not dtypes else dtypes.pop() if len(dtypes) == 1 else "mixed"

    @cached_property
    def num_values(self) -> int:
        """D, the length of the flat vector."""
        return sum(spec.num_values for spec in self.generated)

    @cached_property
    def byte_offsets(self) -> tuple[int, ...]:
        """Start of each tensor in the packed form, and as a last entry its length P."""
        offsets = [0]
        for spec in self.tensors:
            offsets.append(-(-(offsets[-1] + spec.num_bytes) // _ALIGNMENT) * _ALIGNMENT)
        return tuple(offsets)

    @property
    def num_bytes(self) -> int:
        """P, the length of the packed form in bytes."""
        return self.byte_offsets[-1]

    def check(self, state_dict: Mapping[str, Tensor], source: str = "state_dict") -> None:
        """Asserts that a `state_dict` has exactly this layout and only finite values.

        Raises:
            LayoutMismatchError: A tensor is missing, unknown, or has another shape or dtype.
            NonFiniteWeightsError: A tensor holds NaN or infinity.
        """
        names = {spec.name for spec in self.tensors}
        if missing := [spec.name for spec in self.tensors if spec.name not in state_dict]:
            raise LayoutMismatchError(f"{source}: tensor '{missing[0]}' is missing; the layout asks for it")
        if unknown := [name for name in state_dict if name not in names]:
            raise LayoutMismatchError(f"{source}: tensor '{unknown[0]}' is not in the layout; remove it")
        for spec in self.tensors:
            tensor = state_dict[spec.name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.torch_dtype:
                raise LayoutMismatchError(
                    f"{source}: tensor '{spec.name}' is {str(tensor.dtype).removeprefix('torch.')}"
                    f"{list(tensor.shape)}, the layout asks for {spec.dtype}{list(spec.shape)}; "
                    "use weights of this architecture, or build a corpus with its own layout"
                )
            if spec.is_generated and not bool(torch.isfinite(tensor.to(torch.float32)).all()):
                raise NonFiniteWeightsError(
                    f"{source}: tensor '{spec.name}' holds NaN or infinity; drop this checkpoint"
                )

    def flatten(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """The flat vector, float32 `(D,)`."""
        parts = [state_dict[spec.name].detach().reshape(-1).to(torch.float32) for spec in self.generated]
        return torch.cat(parts) if parts else torch.empty(0)

    def unflatten(self, values_D: Tensor, counters: Mapping[str, Tensor] | None = None) -> StateDict:
        """The `state_dict` of a flat vector, in this layout's dtypes and order.

        Args:
            values_D: Float tensor `(D,)`, or `(N, D)` for N networks stacked along a new first dimension.
            counters: Where the tensors that no generator writes come from; zeros where absent.

        Raises:
            LayoutMismatchError: The vector has another length.
        """
        if values_D.shape[-1] != self.num_values:
            raise LayoutMismatchError(
                f"{values_D.shape[-1]} values do not fill a layout of {self.num_values}; generate for this layout"
            )
        batch = values_D.shape[:-1]
        state: StateDict = {}
        start = 0
        for spec in self.tensors:
            if not spec.is_generated:
                kept = (counters or {}).get(spec.name, torch.zeros(spec.shape, dtype=spec.torch_dtype))
                state[spec.name] = kept.detach().to(values_D.device, copy=True).expand((*batch, *spec.shape))
                continue
            piece = values_D[..., start : start + spec.num_values]
            state[spec.name] = piece.reshape((*batch, *spec.shape)).to(spec.torch_dtype)
            start += spec.num_values
        return state

    def pack(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """The packed form, uint8 `(P,)`; call `check` first."""
        packed = torch.zeros(self.num_bytes, dtype=torch.uint8)
        for spec, start in zip(self.tensors, self.byte_offsets, strict=False):
            raw = state_dict[spec.name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            packed[start : start + spec.num_bytes] = raw
        return packed

    def unpack(self, packed_P: Tensor) -> StateDict:
        """The `state_dict` of a packed form `(P,)` or `(N, P)`, bit for bit; views where memory allows."""
        state: StateDict = {}
        batch = packed_P.shape[:-1]
        for spec, start in zip(self.tensors, self.byte_offsets, strict=False):
            raw = packed_P[..., start : start + spec.num_bytes]
            state[spec.name] = _view(raw, spec.torch_dtype).reshape((*batch, *spec.shape))
        return state

    def values(self, packed_NP: Tensor) -> Tensor:
        """Flat vectors `(N, D)` of packed forms `(N, P)`: a view where all tensors are float32 without gaps."""
        whole = all(spec.dtype == "float32" for spec in self.tensors)
        if whole and self.num_bytes == 4 * self.num_values:
            return _view(packed_NP, torch.float32)
        state = self.unpack(packed_NP)
        batch = packed_NP.shape[:-1]
        parts = [state[spec.name].reshape((*batch, spec.num_values)).float() for spec in self.generated]
        return torch.cat(parts, dim=-1) if parts else torch.empty((*batch, 0))

    def slice_values(self, packed_P: Tensor, start: int, length: int) -> Tensor:
        """Part of the flat vector of one packed form, float32 `(length,)`, without reading the rest."""
        parts = []
        value = 0
        for spec, byte in zip(self.tensors, self.byte_offsets, strict=False):
            if not spec.is_generated:
                continue
            first, last = max(start - value, 0), min(start + length - value, spec.num_values)
            if first < last:
                size = spec.torch_dtype.itemsize
                raw = packed_P[byte + first * size : byte + last * size]
                parts.append(_view(raw, spec.torch_dtype).to(torch.float32))
            value += spec.num_values
        return torch.cat(parts) if parts else torch.empty(0)


def _view(raw: Tensor, dtype: torch.dtype) -> Tensor:
    if raw.numel() == 0:
        return torch.empty((*raw.shape[:-1], raw.shape[-1] // dtype.itemsize), dtype=dtype)
    if raw.storage_offset() % dtype.itemsize or any(s % dtype.itemsize for s in raw.stride()[:-1]):
        raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(dtype)


def kind_of(name: str, is_floating_point: bool, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a tensor is, by its name and those beside it; one of `KINDS`."""
    if not is_floating_point:
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
