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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raywgen.inputs import UnusableFileError, check_expansion, open_regular
from raywgen.weights.errors import NotWeightsError, UnsafeFileError, WeightsError
from raywgen.weights.inert_pickle import (
    Array,
    NotPlainError,
    Opaque,
    Pickled,
    Storage,
    TensorReference,
    described_call,
    parse_pickle,
)
from raywgen.weights.kinds import (
    HEAD_BYTES,
    LEGACY,
    MAX_HEADER_BYTES,
    SUFFIXES,
    ZIP,
    foreign,
    foreign_archive,
    is_pickle,
    is_safetensors,
    weights_suffix,
)
from raywgen.weights.layout import Layout
from raywgen.weights.nested import choose_networks, split_prefix
from raywgen.weights.parts import check_whole
from raywgen.weights.tensors import TensorSpec, find_ties, kind_of
from raywgen.weights.torch_archive import TorchArchive, check_entries
from raywgen.weights.torch_legacy import LegacyArchive

_MAX_PICKLE_BYTES = 1 << 30
_ALONE = "save the state_dict alone, best as .safetensors"
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


@dataclass(frozen=True, slots=True)
class ReadNetworks:
    """What a file gave: networks, each by its key where there are several, and the keys of those not taken."""

    networks: tuple[tuple[str | None, PackedCheckpoint], ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Contents:
    """The wanted networks of a torch file: a plan where its tensors are contiguous, else what stands for them."""

    networks: tuple[tuple[str | None, _Plan | Mapping[str, TensorReference | Array]], ...]
    others: tuple[str, ...]


class _CallsError(NotPlainError):
    """A pickle asks to call unknown functions; the message names one and where it stands."""


class WeightsReader:
    """Reads weights files; keeps what it understood of their headers.

    Args:
        select: Keys or patterns of the networks to take from files that hold several.
    """

    def __init__(self, select: Sequence[str] = ()) -> None:
        self._plans: OrderedDict[tuple[str, bytes], _Plan | _Contents] = OrderedDict()
        self._select = tuple(select)

    def read(self, path: str | Path) -> PackedCheckpoint:
        """The only network of a file.

        Raises:
            WeightsError: It is missing, truncated, damaged, or holds no network or several.
            UnsafeFileError: It is a pickle that asks for more than tensors; it is not executed.
        """
        found = list(self.read_all(path).networks)
        if len(found) > 1:
            raise WeightsError(f"{path} holds {len(found)} networks that are selected; select one")
        return found[0][1]

    def read_all(self, path: str | Path) -> ReadNetworks:
        """All wanted networks of a file.

        Raises:
            NotWeightsError: It is sound and holds no network.
            WeightsError: It is missing, truncated, damaged, or it is not said which of several networks is wanted.
            UnsafeFileError: It is a pickle that asks for more than tensors; it is not executed.
        """
        path, source = Path(path), str(path)
        try:
            with open_regular(path) as file:
                return self._read(file, path, source)
        except FileNotFoundError as error:
            raise WeightsError(f"{source} does not exist; give {', '.join(SUFFIXES)}") from error
        except UnusableFileError as error:
            raise WeightsError(
                f"{source} cannot be read ({error}); check the file and give a whole checkpoint, best as .safetensors"
            ) from error
        except OSError as error:
            raise WeightsError(f"{source} cannot be read ({error}); check the file and its permissions") from error

    def _read(self, file: BinaryIO, path: Path, source: str) -> ReadNetworks:
        head, size = file.read(HEAD_BYTES), path.stat().st_size
        suffix = weights_suffix(path.name).lower()
        is_torch = head.startswith((ZIP, LEGACY))
        if not is_torch and (is_safetensors(head, size) or (suffix == ".safetensors" and not foreign(head, path.name))):
            file.seek(0)
            return ReadNetworks(((None, self._read_safetensors(file, path)),))
        kind = None if is_torch else foreign(head, path.name)
        if kind is not None:
            raise (WeightsError if kind.is_broken else NotWeightsError)(f"{source} {kind.what}")
        if not is_torch and not is_pickle(head) and suffix == "" and path.suffix:
            raise WeightsError(f"{source}: unknown kind of weights file; give {', '.join(SUFFIXES)}")
        if not head:
            raise WeightsError(f"{source} is truncated or no torch file (it is empty); fetch it again")
        try:
            return self._read_torch(file, head, size, source)
        except NotPlainError as error:
            if head.startswith(ZIP) and (kind := foreign_archive(file)) is not None:
                raise (WeightsError if kind.is_broken else NotWeightsError)(f"{source} {kind.what}") from error
            check_entries(file, source)
            return self._read_by_torch(path, size, error)

    def _read_torch(self, file: BinaryIO, head: bytes, size: int, source: str) -> ReadNetworks:
        archive: TorchArchive | LegacyArchive | None = None
        if head.startswith(ZIP):
            archive = TorchArchive(file, source)
            content = archive.pickle_bytes()
            known = self._plan("archive", content)
            if known is None:
                known = self._contents(parse_pickle(content), source)
                self._keep("archive", content, known)
            assert isinstance(known, _Contents), "archives have contents"
        elif head.startswith(LEGACY):
            archive = LegacyArchive(file, source)
            known = self._contents(archive.pickled, source)
        else:
            file.seek(0)
            known = self._contents(parse_pickle(file.read(_MAX_PICKLE_BYTES)), source)
        found = [(key, self._take(archive, wanted, size, source)) for key, wanted in known.networks]
        return ReadNetworks(tuple(found), known.others)

    def peek(self, file: Any, source: str) -> None:
        """Looks at the description of an open file's tensors alone; for what is long and lies far away.

        Raises:
            WeightsError: As `read_all`, where the description tells.
        """
        with suppress(NotPlainError):  # Then it must be read.
            if file.read(len(ZIP)) == ZIP:
                self._contents(parse_pickle(TorchArchive(file, source).pickle_bytes()), source)

    def _contents(self, pickled: Pickled, source: str) -> _Contents:
        content, calls = pickled.content, pickled.calls
        if isinstance(content, Opaque) and not pickled.has_storages and content.name not in calls:
            raise NotWeightsError(f"{source} holds no tensors, but an object of class {content.name}; {_ALONE}")
        if calls:
            raise _CallsError(described_call(content, calls))
        choice = choose_networks(content, (TensorReference, Array), source, self._select)
        networks: list[tuple[str | None, _Plan | Mapping[str, TensorReference | Array]]] = []
        for key, network in choice.networks:
            check_whole(network.state, network.beside, source)
            plain = [
                value for value in network.state.values() if isinstance(value, TensorReference) and not value.stride
            ]
            is_plain = len(plain) == len(network.state)
            networks.append((key, _archive_plan(network.state, source) if is_plain else network.state))
        return _Contents(tuple(networks), choice.others)

    def _take(
        self,
        archive: TorchArchive | LegacyArchive | None,
        wanted: _Plan | Mapping[str, TensorReference | Array],
        size: int,
        source: str,
    ) -> PackedCheckpoint:
        if isinstance(wanted, _Plan):
            assert archive is not None, "a plan is of storages"
            return _copy(archive, wanted, size, source)
        references = [value for value in wanted.values() if isinstance(value, TensorReference)]
        check_expansion(sum(reference.byte_range[1] for reference in references), size, source)
        storages: dict[Storage, Tensor] = {}
        for storage in {reference.storage for reference in references}:
            assert archive is not None, "references are of storages"
            archive.check_storage(storage.key, storage.num_bytes)
            values = bytearray(storage.num_bytes)
            archive.read_storage(storage.key, memoryview(values))
            dtype = getattr(torch, storage.dtype)
            storages[storage] = torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
        return pack({name: _tensor(value, storages) for name, value in wanted.items()}, source)

    def _read_by_torch(self, path: Path, size: int, why: NotPlainError) -> ReadNetworks:
        """By torch's own safe reader, which knows more kinds of tensors and fewer other values."""
        source = str(path)
        content = load_pickled(path, str(why) if isinstance(why, _CallsError) else "")
        choice = choose_networks(content, Tensor, source, self._select)
        for _, network in choice.networks:
            check_whole(network.state, network.beside, source)
        # A tensor may repeat one stored value without end.
        states = [network.state for _, network in choice.networks]
        check_expansion(sum(_num_bytes(tensor) for state in states for tensor in state.values()), size, source)
        found = [(key, pack(network.state, source)) for key, network in choice.networks]
        return ReadNetworks(tuple(found), choice.others)

    def _read_safetensors(self, file: BinaryIO, path: Path) -> PackedCheckpoint:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 2 <= length <= MAX_HEADER_BYTES else b""
        if len(header) != length or not header:
            raise WeightsError(f"{path} is truncated or no safetensors file; fetch it again")
        plan = self._plan("safetensors", header)
        if not isinstance(plan, _Plan):
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

    def _plan(self, kind: str, content: bytes) -> _Plan | _Contents | None:
        plan = self._plans.get((kind, content))
        if plan is not None:
            self._plans.move_to_end((kind, content))
        return plan

    def _keep(self, kind: str, content: bytes, plan: _Plan | _Contents) -> None:
        self._plans[kind, content] = plan
        if len(self._plans) > _MAX_PLANS:
            self._plans.popitem(last=False)


def _copy(archive: TorchArchive | LegacyArchive, plan: _Plan, size: int, source: str) -> PackedCheckpoint:
    for key, num_bytes in plan.entries.items():
        archive.check_storage(key, num_bytes)
    check_expansion(plan.layout.num_bytes, size, source)
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


def _tensor(value: TensorReference | Array, storages: Mapping[Storage, Tensor]) -> Tensor:
    if isinstance(value, Array):
        return torch.from_numpy(value.values)
    flat = storages[value.storage]
    if 0 in value.shape:
        return flat.new_empty(value.shape)
    stride = value.stride or torch.empty(value.shape, device="meta").stride()
    return flat.as_strided(value.shape, stride, value.offset)


def load_pickled(path: Path, why: str = "") -> Any:
    """What any torch file holds, by torch's own safe reader.

    Args:
        path: The file.
        why: What it asks for that is not given, where that is known.

    Raises:
        UnsafeFileError: It asks for more than tensors.
        WeightsError: It is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path} holds pickled code or objects{f' ({why})' if why else ''}, which are never executed"
            f"{'' if why else ', or is damaged'}; {_ALONE}"
        ) from error
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        raise WeightsError(f"{path} is truncated or no torch file ({error}); fetch it again") from error


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


def _archive_plan(state: Mapping[str, TensorReference], source: str) -> _Plan:
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
