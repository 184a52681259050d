"""Layouts: the order in which the tensors of a `state_dict` lie in a flat vector, and in bytes.

An architecture is identified by names, shapes and kinds of its tensors. The same architecture comes in many forms: in
other orders, dtypes, inside wrappers, with tied tensors under one name or two. A `Layout` is one form; all forms of an
architecture have one `id`, and `arranged_like` gives them one flat vector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from raywgen.json_types import JsonObject
from raywgen.weights.errors import LayoutMismatchError, NonFiniteWeightsError, WeightsError
from raywgen.weights.names import plain_names, without_wrappers
from raywgen.weights.tensors import StateDict, TensorSpec, find_ties, is_mask, kind_of, real_values

_ALIGNMENT = 8
ReadRanges = Callable[[Sequence[tuple[int, int]]], Sequence[Tensor]]


@dataclass(frozen=True)
class Layout:
    """An ordered table of tensors.

    The **flat vector** holds the real values of all generated tensors as float32, one after another in the order of
    `tensors`; it is what a generator sees. The **packed form** holds every tensor's own bytes, each starting at a
    multiple of 8; it is what a corpus stores, so that dtypes and counters come back bit for bit.

    Attributes:
        tensors: The tensors, in the order of the flat vector.
        packing: Indices into `tensors` in the order of the packed form and of a `state_dict`; None if it is the same.
    """

    tensors: tuple[TensorSpec, ...]
    packing: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        dtypes = ", ".join(dict.fromkeys(spec.dtype for spec in self.tensors))
        return f"Layout({len(self.tensors)} tensors, {self.num_values:,} values, {dtypes})"

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> Self:
        """Reads names, shapes, dtypes, kinds, ties and masks from a `state_dict`.

        Raises:
            WeightsError: The `state_dict` is empty, or an entry is not a tensor.
        """
        if not state_dict:
            raise WeightsError("the state_dict is empty; give one with at least one tensor")
        for name, tensor in state_dict.items():
            if not isinstance(tensor, Tensor):
                raise WeightsError(f"entry '{name}' is a {type(tensor).__name__}, not a tensor; remove it")
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        ties = find_ties(state_dict)
        return cls(
            tuple(
                TensorSpec(
                    name=name,
                    shape=shapes[name],
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    kind=kind_of(name, tensor.dtype, shapes),
                    tied_to=ties.get(name, ""),
                    is_constant=is_mask(name, tensor),
                )
                for name, tensor in state_dict.items()
            )
        )

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> Self:
        """Reads what `to_json` wrote."""
        return cls(tuple(TensorSpec(**{**row, "shape": tuple(row["shape"])}) for row in rows))

    def to_json(self) -> list[JsonObject]:
        """Returns one JSON object per tensor, in the order of the packed form."""
        return [spec.to_json() for _, spec in self.packed_order]

    @cached_property
    def id(self) -> str:
        """Identifies the architecture: depends on names without wrappers, shapes and kinds, not on order and dtypes."""
        rows = sorted(
            (name, spec.shape, spec.kind)
            for name, spec in zip(self.plain_names, self.tensors, strict=True)
            if not spec.tied_to
        )
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    @cached_property
    def form_id(self) -> str:
        """Identifies this form of the architecture: depends on order, dtypes and full names too."""
        rows = [replace(spec, is_constant=False).to_json() for _, spec in self.packed_order]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def plain_names(self) -> tuple[str, ...]:
        """The tensors' names without wrappers, which all forms of an architecture share."""
        return tuple(plain_names([spec.name for spec in self.tensors]))

    @property
    def packed_order(self) -> list[tuple[int, TensorSpec]]:
        """Indices into `tensors`, and the tensors, in the order of the packed form."""
        places = range(len(self.tensors)) if self.packing is None else self.packing
        return [(place, self.tensors[place]) for place in places]

    def arranged_like(self, known: Layout) -> Layout:
        """Returns this form with the flat vector, and the constants, of another form of the same architecture."""
        assert known.id == self.id, "forms of one architecture"
        place_of = {name: place for place, name in enumerate(self.plain_names)}
        constant = {name for name, spec in zip(known.plain_names, known.tensors, strict=True) if spec.is_constant}
        order = [place_of[name] for name in known.plain_names if name in place_of]
        order += [place for place in range(len(self.tensors)) if place not in set(order)]
        tensors = tuple(
            replace(self.tensors[place], is_constant=self.plain_names[place] in constant) for place in order
        )
        new_place = {place: index for index, place in enumerate(order)}
        packing = tuple(new_place[place] for place, _ in self.packed_order)
        return Layout(tensors, None if packing == tuple(range(len(packing))) else packing)

    def has_order_of(self, known: Layout) -> bool:
        """Whether the flat vector of another form of the architecture has the same order."""
        ours, theirs = (
            [name for name, spec in zip(layout.plain_names, layout.tensors, strict=True) if spec.is_generated]
            for layout in (self, known)
        )
        return ours == theirs

    def names_in(self, other: Layout) -> dict[str, str]:
        """Maps the name of each tensor to its name in another form of the architecture, if it is there."""
        theirs = dict(zip(other.plain_names, (spec.name for spec in other.tensors), strict=True))
        own = zip(self.plain_names, self.tensors, strict=True)
        return {spec.name: theirs[plain] for plain, spec in own if plain in theirs}

    def with_constants(self, names: Collection[str]) -> Layout:
        """Marks further tensors as constants."""
        marked = (replace(spec, is_constant=spec.is_constant or spec.name in names) for spec in self.tensors)
        return replace(self, tensors=tuple(marked))

    def rooted_at(self, names: Collection[str]) -> Layout:
        """Returns the form in which the first of these plain names owns the values of each set of tied tensors."""
        plain = dict(zip((spec.name for spec in self.tensors), self.plain_names, strict=True))
        root = {spec.tied_to or spec.name: spec.tied_to or spec.name for spec in self.tensors}
        for spec in reversed(self.tensors):
            if plain[spec.name] in names:
                root[spec.tied_to or spec.name] = spec.name
        tied = ((spec, root[spec.tied_to or spec.name]) for spec in self.tensors)
        return replace(
            self, tensors=tuple(replace(spec, tied_to="" if name == spec.name else name) for spec, name in tied)
        )

    def unwrapped(self) -> Layout:
        """Returns the same architecture in the order of its flat vector, under names without wrappers."""
        names = [spec.name for spec in self.tensors]
        new = dict(zip(names, without_wrappers(names), strict=True))
        return Layout(
            tuple(replace(spec, name=new[spec.name], tied_to=new.get(spec.tied_to, "")) for spec in self.tensors)
        )

    @cached_property
    def generated(self) -> tuple[TensorSpec, ...]:
        """The tensors in the flat vector, in order."""
        return tuple(spec for spec in self.tensors if spec.is_generated)

    @cached_property
    def dtype(self) -> str:
        """The dtype of the generated tensors: `mixed` if they differ, `none` if there are none."""
        dtypes = {spec.dtype for spec in self.generated}
        return "none" if not dtypes else dtypes.pop() if len(dtypes) == 1 else "mixed"

    @cached_property
    def num_values(self) -> int:
        """D, the length of the flat vector."""
        return sum(spec.num_values for spec in self.generated)

    @cached_property
    def byte_offsets(self) -> tuple[int, ...]:
        """The start of each tensor in the packed form, followed by its length P."""
        offsets = [0] * (len(self.tensors) + 1)
        end = 0
        for place, spec in self.packed_order:
            offsets[place] = end
            end = -(-(end + spec.num_bytes) // _ALIGNMENT) * _ALIGNMENT
        own = {spec.name: start for spec, start in zip(self.tensors, offsets, strict=False)}
        for place, spec in self.packed_order:
            offsets[place] = own[spec.tied_to or spec.name]
        return (*offsets[:-1], end)

    @property
    def num_bytes(self) -> int:
        """P, the length of the packed form in bytes."""
        return self.byte_offsets[-1]

    def check(self, state_dict: Mapping[str, Tensor], source: str = "state_dict") -> None:
        """Checks that a `state_dict` has exactly this layout and only finite values.

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
            if spec.is_generated and not bool(real_values(tensor).float().isfinite().all()):
                raise NonFiniteWeightsError(
                    f"{source}: tensor '{spec.name}' holds NaN or infinity; drop this checkpoint"
                )
            if spec.tied_to and not torch.equal(_raw(tensor), _raw(state_dict[spec.tied_to])):
                raise LayoutMismatchError(
                    f"{source}: tensor '{spec.name}' differs from '{spec.tied_to}', to which the layout ties it; "
                    "give both the same values"
                )

    def flatten(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """Returns the flat vector, float32 `(D,)`."""
        parts = [real_values(state_dict[spec.name].detach()).reshape(-1).to(torch.float32) for spec in self.generated]
        return torch.cat(parts) if parts else torch.empty(0)

    def unflatten(self, values_D: Tensor, counters: Mapping[str, Tensor] | None = None) -> StateDict:
        """Returns the `state_dict` of a flat vector, in this layout's dtypes and the order of its packed form.

        Tied names share one tensor.

        Args:
            values_D: Float tensor `(D,)`, or `(N, D)` for N networks stacked along a new first dimension.
            counters: The tensors that no generator writes; missing ones are filled with zeros.

        Raises:
            LayoutMismatchError: The vector has another length.
        """
        if values_D.shape[-1] != self.num_values:
            raise LayoutMismatchError(
                f"{values_D.shape[-1]} values do not fill a layout of {self.num_values}; generate for this layout"
            )
        batch = values_D.shape[:-1]
        own: StateDict = {}
        start = 0
        for spec in self.tensors:
            if spec.tied_to:
                continue
            if not spec.is_generated:
                kept = (counters or {}).get(spec.name, torch.zeros(spec.shape, dtype=spec.torch_dtype))
                own[spec.name] = kept.detach().to(values_D.device, copy=True).expand((*batch, *spec.shape))
                continue
            piece = values_D[..., start : start + spec.num_values].reshape((*batch, *spec.real_shape))
            if spec.torch_dtype.is_complex:
                # A copy, because pairs must begin at an even place in memory.
                piece = torch.view_as_complex(piece.float().clone(memory_format=torch.contiguous_format))
            own[spec.name] = piece.to(spec.torch_dtype)
            start += spec.num_values
        return {spec.name: own[spec.tied_to or spec.name] for _, spec in self.packed_order}

    def pack(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """Returns the packed form, uint8 `(P,)`; call `check` first."""
        packed = torch.zeros(self.num_bytes, dtype=torch.uint8)
        for spec, start in zip(self.tensors, self.byte_offsets, strict=False):
            if spec.num_bytes:
                packed[start : start + spec.num_bytes] = _raw(state_dict[spec.name])
        return packed

    def unpack(self, packed_P: Tensor) -> StateDict:
        """Returns the `state_dict` of a packed form `(P,)` or `(N, P)`, bit for bit; as views if alignment allows."""
        is_aligned = packed_P.is_contiguous() and packed_P.storage_offset() % _ALIGNMENT == 0
        # Elements of complex128 are wider than the alignment.
        is_narrow = all(dtype.itemsize <= _ALIGNMENT for _, dtype, *_ in self._strided)
        if packed_P.dim() == 1 and packed_P.numel() and is_aligned and is_narrow:
            return self._unpack_aligned(packed_P)
        own: StateDict = {}
        batch = packed_P.shape[:-1]
        for spec, start in zip(self.tensors, self.byte_offsets, strict=False):
            if not spec.tied_to:
                raw = packed_P[..., start : start + spec.num_bytes]
                own[spec.name] = _view(raw, spec.torch_dtype).reshape((*batch, *spec.shape))
        return {spec.name: own[spec.tied_to or spec.name] for _, spec in self.packed_order}

    def _unpack_aligned(self, packed_P: Tensor) -> StateDict:
        """Unpacks one aligned packed form; several times as fast as slicing it tensor by tensor."""
        elements = {dtype: packed_P.view(dtype) for dtype in {dtype for _, dtype, *_ in self._strided}}
        found: StateDict = {}
        for name, dtype, shape, stride, start in self._strided:
            view = elements[dtype]
            found[name] = view.as_strided(shape, stride, view.storage_offset() + start)
        return {spec.name: found[spec.tied_to or spec.name] for _, spec in self.packed_order}

    @cached_property
    def _strided(self) -> list[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int]]:
        """Name, dtype, shape, strides and first element of each tensor that is not tied, in the packed form."""
        return [
            (
                spec.name,
                spec.torch_dtype,
                spec.shape,
                torch.empty(spec.shape, device="meta").stride(),
                start // spec.torch_dtype.itemsize,
            )
            for spec, start in zip(self.tensors, self.byte_offsets, strict=False)
            if not spec.tied_to
        ]

    def values(self, packed_NP: Tensor) -> Tensor:
        """Returns flat vectors `(N, D)` of packed forms `(N, P)`: a view if all tensors are float32 without gaps."""
        whole = all(spec.dtype == "float32" and spec.is_generated for spec in self.tensors)
        if whole and self.packing is None and self.num_bytes == 4 * self.num_values:
            return _view(packed_NP, torch.float32)
        state = self.unpack(packed_NP)
        batch = packed_NP.shape[:-1]
        parts = [real_values(state[spec.name]).reshape((*batch, spec.num_values)).float() for spec in self.generated]
        return torch.cat(parts, dim=-1) if parts else torch.empty((*batch, 0))

    def tensor(self, read: ReadRanges, name: str) -> Tensor:
        """Reads one tensor of one packed form, bit for bit, without reading the rest; `read` as for `slice_values`."""
        place = next(place for place, spec in enumerate(self.tensors) if spec.name == name)
        spec, start = self.tensors[place], self.byte_offsets[place]
        (raw,) = read([(start, start + spec.num_bytes)])
        return _view(raw, spec.torch_dtype).reshape(spec.shape)

    def slice_values(self, read: ReadRanges, start: int, length: int) -> Tensor:
        """Reads a part of the flat vector of one packed form, float32 `(length,)`, without reading the rest.

        Args:
            read: Returns some bytes of the packed form, given the first byte and the end of each range.
            start: The first value.
            length: Number of values; those beyond the end of the vector are left out.
        """
        dtypes, ranges = [], []
        value = 0
        for spec, byte in zip(self.tensors, self.byte_offsets, strict=False):
            if not spec.is_generated:
                continue
            first, last = max(start - value, 0), min(start + length - value, spec.num_values)
            if first < last:
                dtype = spec.torch_dtype.to_real() if spec.torch_dtype.is_complex else spec.torch_dtype
                dtypes.append(dtype)
                ranges.append((byte + first * dtype.itemsize, byte + last * dtype.itemsize))
            value += spec.num_values
        parts = [_view(raw, dtype).to(torch.float32) for raw, dtype in zip(read(ranges), dtypes, strict=True)]
        return torch.cat(parts) if parts else torch.empty(0)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _view(raw: Tensor, dtype: torch.dtype) -> Tensor:
    if raw.numel() == 0:
        return torch.empty((*raw.shape[:-1], raw.shape[-1] // dtype.itemsize), dtype=dtype)
    if raw.storage_offset() % dtype.itemsize or any(s % dtype.itemsize for s in raw.stride()[:-1]):
        raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(dtype)
