"""Reads weights files into the packed form of their layout, thousands a second where they share a layout.

What describes a checkpoint (the header of a safetensors file, the pickle of a torch file) is the same, byte for
byte, for every checkpoint of an architecture. It is checked and understood once; of every further file only the
values are copied.

Shape legend: P bytes of the packed form.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raywgen.inputs import UnusableFileError, check_expansion, open_regular
from raywgen.weights.errors import UnsafeFileError, WeightsError
from raywgen.weights.layout import Layout
from raywgen.weights.nested import find_state_dict, split_prefix
from raywgen.weights.tensors import TensorSpec, find_ties, kind_of
from raywgen.weights.torch_archive import NotPlainError, TensorReference, TorchArchive, check_entries, parse_pickle

PICKLED = (".pt", ".pth", ".th", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
_MAX_HEADER_BYTES = 100 << 20
_MAX_PLANS = 256
_MAPPED_BYTES = 1 << 22
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


SAFETENSORS_DTYPES = frozenset(_DTYPES.values())
"""What a safetensors file can hold, as torch names it."""


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """One checkpoint as bytes.

    Attributes:
        layout: Its names come without `prefix`.
        packed_P: uint8.
        prefix: What a wrapper had put before every name.
    """

    layout: Layout
    packed_P: np.ndarray
    prefix: str


@dataclass(frozen=True, slots=True)
class _Copy:
    """`num_bytes` from byte `source` of an entry to byte `target` of the packed form."""

    entry: str
    source: int
    target: int
    num_bytes: int
    is_whole: bool = False
    """It is all that is wanted of its entry, and all that the entry holds."""


@dataclass(frozen=True, slots=True)
class _Plan:
    layout: Layout
    prefix: str
    copies: tuple[_Copy, ...]
    entries: dict[str, int]
    """Bytes of each entry."""
    doubles: tuple[tuple[str, int, int, int], ...] = ()
    """Tensors that are told to be tied and lie in the file all the same: name, both places, and bytes."""


class WeightsReader:
    """Reads weights files; keeps what it understood of their headers."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[str, bytes], _Plan] = OrderedDict()

    def read(self, path: str | Path) -> PackedCheckpoint:
        """One file.

        Raises:
            WeightsError: It is missing, truncated, damaged, or holds no `state_dict`.
            UnsafeFileError: It is a pickle that asks for more than tensors; it is not executed.
        """
        path = Path(path)
        # Trainers also write torch files without a suffix.
        if path.suffix not in ("", *SUFFIXES):
            raise WeightsError(f"{path}: unknown kind of weights file; give {', '.join(SUFFIXES)}")
        try:
            with open_regular(path) as file:
                if path.suffix == ".safetensors":
                    return self._read_safetensors(file, path)
                try:
                    return self._read_archive(file, path)
                except NotPlainError:
                    check_entries(file, str(path))
                    state = load_pickled(path)
                    # A tensor may repeat one stored value without end.
                    check_expansion(sum(map(_num_bytes, state.values())), path.stat().st_size, str(path))
                    return pack(state, str(path))
        except FileNotFoundError as error:
            raise WeightsError(f"{path} does not exist; give {', '.join(SUFFIXES)}") from error
        except UnusableFileError as error:
            raise WeightsError(
                f"{path} cannot be read ({error}); check the file and give a whole checkpoint, best as .safetensors"
            ) from error
        except OSError as error:
            raise WeightsError(f"{path} cannot be read ({error}); check the file and its permissions") from error

    def _read_safetensors(self, file: BinaryIO, path: Path) -> PackedCheckpoint:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 2 <= length <= _MAX_HEADER_BYTES else b""
        if len(header) != length or not header:
            raise WeightsError(f"{path} is truncated or no safetensors file; fetch it again")
        plan = self._plan("safetensors", header)
        if plan is None:
            plan = _safetensors_plan(header, path)
            self._keep("safetensors", header, plan)
        size = plan.entries[""]
        if path.stat().st_size != 8 + length + size:
            raise WeightsError(f"{path} does not have the {8 + length + size} bytes its header says; fetch it again")
        for name, one, other, num_bytes in plan.doubles:
            if _bytes_at(file, 8 + length + one, num_bytes) != _bytes_at(file, 8 + length + other, num_bytes):
                raise WeightsError(
                    f"{path}: its metadata tie tensor '{name}' to another one, from which it differs; take that entry "
                    "out of the metadata, or write the file anew"
                )
        if plan.layout.num_bytes == size >= _MAPPED_BYTES and len(plan.copies) == 1:
            # It lies in the file as it is packed. Private, so that it may be written to and the file stays as it is.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            packed_P = np.frombuffer(mapped, dtype=np.uint8, count=size, offset=8 + length)
            return PackedCheckpoint(plan.layout, packed_P, plan.prefix)
        packed_P = np.zeros(plan.layout.num_bytes, dtype=np.uint8)
        out = packed_P.data
        for copy in plan.copies:
            file.seek(8 + length + copy.source)
            part = out[copy.target : copy.target + copy.num_bytes]
            if file.readinto(part) != copy.num_bytes:  # pyright: ignore[reportAttributeAccessIssue]
                raise WeightsError(f"{path} was cut short while it was read; fetch it again")
        return PackedCheckpoint(plan.layout, packed_P, plan.prefix)

    def _read_archive(self, file: BinaryIO, path: Path) -> PackedCheckpoint:
        archive = TorchArchive(file, str(path))
        content = archive.pickle_bytes()
        plan = self._plan("archive", content)
        if plan is None:
            plan = _archive_plan(content, str(path))
            self._keep("archive", content, plan)
        for key, num_bytes in plan.entries.items():
            archive.check_storage(key, num_bytes)
        check_expansion(plan.layout.num_bytes, path.stat().st_size, str(path))
        packed_P = np.zeros(plan.layout.num_bytes, dtype=np.uint8)
        out = packed_P.data
        storages: dict[str, memoryview] = {}
        for copy in plan.copies:
            part = out[copy.target : copy.target + copy.num_bytes]
            if copy.is_whole:
                archive.read_storage(copy.entry, part)
                continue
            if copy.entry not in storages:
                storages[copy.entry] = memoryview(bytearray(plan.entries[copy.entry]))
                archive.read_storage(copy.entry, storages[copy.entry])
            part[:] = storages[copy.entry][copy.source : copy.source + copy.num_bytes]
        return PackedCheckpoint(plan.layout, packed_P, plan.prefix)

    def _plan(self, kind: str, content: bytes) -> _Plan | None:
        plan = self._plans.get((kind, content))
        if plan is not None:
            self._plans.move_to_end((kind, content))
        return plan

    def _keep(self, kind: str, content: bytes, plan: _Plan) -> None:
        self._plans[kind, content] = plan
        if len(self._plans) > _MAX_PLANS:
            self._plans.popitem(last=False)


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The `state_dict` in any torch file, by torch's own safe reader.

    Raises:
        UnsafeFileError: It asks for more than tensors.
        WeightsError: It is damaged, or holds no `state_dict`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path} holds pickled code or objects, which are never executed, or is damaged; "
            "save the state_dict alone, best as .safetensors"
        ) from error
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        raise WeightsError(f"{path} is truncated or no torch file ({error}); fetch it again") from error
    return find_state_dict(content, Tensor, str(path))


def pack(state_dict: Mapping[str, Tensor], source: str) -> PackedCheckpoint:
    """A `state_dict` in memory, its prefix split off."""
    prefix, names = split_prefix(list(state_dict))
    state = dict(zip(names, state_dict.values(), strict=True))
    ties = find_ties(state)
    if sparse := [name for name, tensor in state.items() if not _is_dense(tensor)]:
        raise WeightsError(f"{source}: tensor '{sparse[0]}' is sparse, quantised, nested or on 'meta'; save it dense")
    plain = {name: _plain(tensor) for name, tensor in state.items() if name not in ties}
    state = {name: plain[ties.get(name, name)] for name in state}
    layout = Layout.from_state_dict(state)
    return PackedCheckpoint(layout, layout.pack(state).numpy(), prefix)


def _num_bytes(tensor: Tensor) -> int:
    """Of all its values, written out."""
    return tensor.numel() * tensor.element_size() if _is_dense(tensor) else 0


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def _plain(tensor: Tensor) -> Tensor:
    """Its values in order: a single value with a stride of its own counts as contiguous, yet has no view as bytes."""
    return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _bytes_at(file: BinaryIO, start: int, num_bytes: int) -> bytes:
    file.seek(start)
    return file.read(num_bytes)


def _safetensors_plan(header: bytes, path: Path) -> _Plan:
    try:
        with safe_open(path, "pt"):  # The library's own checks of offsets, overlaps and lengths.
            pass
        content: dict[str, Any] = json.loads(header)
        metadata: dict[str, str] = content.pop("__metadata__", None) or {}
        rows = [(name, row["dtype"], tuple(row["shape"]), row["data_offsets"]) for name, row in content.items()]
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error
    if unknown := [dtype for _, dtype, _, _ in rows if not hasattr(torch, _DTYPES.get(dtype, ""))]:
        raise WeightsError(f"{path}: dtype {unknown[0]} is not known; give one of {', '.join(_DTYPES)}")
    if not rows:
        raise WeightsError(f"{path} holds no tensor; give a checkpoint")
    tensors = {name: (_DTYPES[dtype], _stored_shape(dtype, shape)) for name, dtype, shape, _ in rows}
    starts = {name: offsets[0] for name, _, _, offsets in rows}
    size = max(offsets[1] for *_, offsets in rows)
    ties = _told_ties(metadata, tensors)
    doubles = [(name, starts[name], starts[owner]) for name, owner in ties.items() if name in starts]
    tensors |= {name: tensors[owner] for name, owner in ties.items()}
    starts |= {name: starts[owner] for name, owner in ties.items()}
    plan = _make_plan(tensors, [("", starts[name]) for name in tensors], {"": size}, str(path), ties)
    num_bytes = {name: math.prod(shape) * getattr(torch, dtype).itemsize for name, (dtype, shape) in tensors.items()}
    return replace(plan, doubles=tuple((*double, num_bytes[double[0]]) for double in doubles))


def _stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in torch, which counts a byte with two values of 4 bits as one."""
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" and shape else shape


def _told_ties(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> dict[str, str]:
    """Ties as safetensors' `save_model` tells them: the metadata hold the name of the tensor that stands for another.

    The other one may lie in the file too.
    """
    return {
        name: owner
        for name, owner in metadata.items()
        if owner in tensors
        and name != owner
        and owner not in metadata
        and (tensors[name] == tensors[owner] if name in tensors else "." in name)
    }


def _archive_plan(content: bytes, source: str) -> _Plan:
    state = find_state_dict(parse_pickle(content), TensorReference, source)
    tensors = {name: (reference.storage.dtype, reference.shape) for name, reference in state.items()}
    sources = [(reference.storage.key, reference.byte_range[0]) for reference in state.values()]
    storages = {reference.storage.key: reference.storage for reference in state.values()}
    if any(storages[reference.storage.key] != reference.storage for reference in state.values()):
        raise NotPlainError("a storage of two kinds")
    first: dict[TensorReference, str] = {}
    owners = {name: first.setdefault(reference, name) for name, reference in state.items() if reference.byte_range[1]}
    ties = {name: owner for name, owner in owners.items() if name != owner}
    entries = {key: storage.num_bytes for key, storage in storages.items()}
    return _make_plan(tensors, sources, entries, source, ties)


def _make_plan(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    sources: list[tuple[str, int]],
    entries: dict[str, int],
    file: str,
    ties: Mapping[str, str],
) -> _Plan:
    # A length of 0 lets any other through: no bytes are missing.
    if huge := [name for name, (_, shape) in tensors.items() if math.prod(max(length, 1) for length in shape) >= 2**63]:
        raise WeightsError(f"{file}: tensor '{huge[0]}' is larger than any tensor can be; fetch it again")
    prefix, names = split_prefix(list(tensors))
    shapes = {name: shape for name, (_, shape) in zip(names, tensors.values(), strict=True)}
    specs = tuple(
        TensorSpec(
            name=name,
            shape=shape,
            dtype=dtype,
            kind=kind_of(name, getattr(torch, dtype), shapes),
            tied_to=ties[full].removeprefix(prefix) if full in ties else "",
        )
        for name, (full, (dtype, shape)) in zip(names, tensors.items(), strict=True)
    )
    layout = Layout(specs)
    copies: list[_Copy] = []
    for (entry, source), target, spec in zip(sources, layout.byte_offsets, specs, strict=False):
        if not spec.num_bytes:
            continue
        last = copies[-1] if copies else None
        adjoins = last is not None and (last.entry, last.source + last.num_bytes) == (entry, source)
        if last is not None and adjoins and last.target + last.num_bytes == target:
            copies[-1] = _Copy(entry, last.source, last.target, last.num_bytes + spec.num_bytes)
        else:
            copies.append(_Copy(entry, source, target, spec.num_bytes))
    wanted = Counter(copy.entry for copy in copies)
    copies = [
        replace(copy, is_whole=wanted[copy.entry] == 1 and copy.num_bytes == entries[copy.entry]) for copy in copies
    ]
    return _Plan(layout, prefix, tuple(copies), entries)
