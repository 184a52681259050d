"""Reads weights files into the packed form of their layout, thousands per second if they share a layout.

The description of a checkpoint (the header of a safetensors file, the pickle of a torch file) is the same, byte for
byte, for every checkpoint of an architecture. It is checked and parsed once; from every further file only the values
are copied.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from raywgen.inputs import UnusableFileError, check_expansion, open_regular
from raywgen.weights.copy_plan import CopyPlan, archive_plan, safetensors_plan
from raywgen.weights.errors import NotWeightsError, UnsafeFileError, WeightsError
from raywgen.weights.inert_pickle import (
    Array,
    NotPlainError,
    Opaque,
    Pickled,
    TensorReference,
    TorchStorage,
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
from raywgen.weights.nested import choose_networks
from raywgen.weights.packed import PackedCheckpoint, pack, written_bytes
from raywgen.weights.parts import check_whole
from raywgen.weights.torch_archive import TorchArchive, check_entries
from raywgen.weights.torch_legacy import LegacyArchive

_MAX_PICKLE_BYTES = 1 << 30
_ALONE = "save the state_dict alone, best as .safetensors"
_MAX_PLANS = 256
_MAPPED_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class ReadNetworks:
    """The networks read from a file, each with its key if there are several, and the keys of those not taken."""

    networks: tuple[tuple[str | None, PackedCheckpoint], ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _TorchContents:
    """The selected networks of a torch file: a plan if the tensors are contiguous, else references to them."""

    networks: tuple[tuple[str | None, CopyPlan | Mapping[str, TensorReference | Array]], ...]
    others: tuple[str, ...]


class _CallsError(NotPlainError):
    """A pickle asks to call unknown functions; the message names one and its key."""


class WeightsReader:
    """Reads weights files, and caches the plans made from their headers.

    Args:
        select: Keys or patterns of the networks to take from files that hold several.
    """

    def __init__(self, select: Sequence[str] = ()) -> None:
        self._plans: OrderedDict[tuple[str, bytes], CopyPlan | _TorchContents] = OrderedDict()
        self._select = tuple(select)

    def read(self, path: str | Path) -> PackedCheckpoint:
        """Reads the only network of a file.

        Raises:
            WeightsError: The file is missing, truncated, damaged, or holds no network or several.
            UnsafeFileError: The file is a pickle that asks for more than tensors; it is not executed.
        """
        found = list(self.read_all(path).networks)
        if len(found) > 1:
            raise WeightsError(f"{path} holds {len(found)} networks that are selected; select one")
        return found[0][1]

    def read_all(self, path: str | Path) -> ReadNetworks:
        """Reads all selected networks of a file.

        Raises:
            NotWeightsError: The file is sound and holds no network.
            WeightsError: The file is missing, truncated, damaged, or holds several networks of which none is selected.
            UnsafeFileError: The file is a pickle that asks for more than tensors; it is not executed.
        """
        source = str(path)
        try:
            with open_regular(source) as file:
                return self._read(file, source)
        except FileNotFoundError as error:
            raise WeightsError(f"{source} does not exist; give {', '.join(SUFFIXES)}") from error
        except UnusableFileError as error:
            raise WeightsError(
                f"{source} cannot be read ({error}); check the file and give a whole checkpoint, best as .safetensors"
            ) from error
        except OSError as error:
            raise WeightsError(f"{source} cannot be read ({error}); check the file and its permissions") from error

    def _read(self, file: BinaryIO, source: str) -> ReadNetworks:
        head, size = file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size
        is_torch = head.startswith((ZIP, LEGACY))
        if not is_torch and is_safetensors(head, size):
            return ReadNetworks(((None, self._read_safetensors(file, size, source)),))
        name = os.path.basename(source)
        suffix = weights_suffix(name).lower()
        kind = None if is_torch else foreign(head, name)
        if suffix == ".safetensors" and not is_torch and kind is None:
            return ReadNetworks(((None, self._read_safetensors(file, size, source)),))
        if kind is not None:
            raise (WeightsError if kind.is_broken else NotWeightsError)(f"{source} {kind.what}")
        if not is_torch and not is_pickle(head) and suffix == "" and Path(source).suffix:
            raise WeightsError(f"{source}: unknown kind of weights file; give {', '.join(SUFFIXES)}")
        if not head:
            raise WeightsError(f"{source} is truncated or no torch file (it is empty); fetch it again")
        try:
            return self._read_torch(file, head, size, source)
        except NotPlainError as error:
            if head.startswith(ZIP) and (kind := foreign_archive(file)) is not None:
                raise (WeightsError if kind.is_broken else NotWeightsError)(f"{source} {kind.what}") from error
            check_entries(file, source)
            return self._read_by_torch(size, source, error)

    def _read_torch(self, file: BinaryIO, head: bytes, size: int, source: str) -> ReadNetworks:
        archive: TorchArchive | LegacyArchive | None = None
        if head.startswith(ZIP):
            archive = TorchArchive(file, source)
            known = self._archived(archive, source)
        elif head.startswith(LEGACY):
            archive = LegacyArchive(file, source)
            known = self._contents(archive.pickled, source)
        else:
            file.seek(0)
            known = self._contents(parse_pickle(file.read(_MAX_PICKLE_BYTES)), source)
        found = [(key, self._take(archive, wanted, size, source)) for key, wanted in known.networks]
        return ReadNetworks(tuple(found), known.others)

    def peek(self, file: BinaryIO, source: str) -> None:
        """Checks only the description of an open file's tensors, because a large remote file is slow to read.

        Raises:
            WeightsError: The description shows that `read_all` would raise it.
        """
        with suppress(NotPlainError):  # Only reading the whole file decides that.
            if file.read(len(ZIP)) == ZIP:
                self._contents(parse_pickle(TorchArchive(file, source).pickle_bytes()), source)

    def least_bytes(self, path: str | Path) -> int:
        """Returns the bytes of the packed networks that `read_all` reads, by the description of the tensors alone.

        It is 0 for a file that cannot be used, and for one of which only its values tell.
        """
        source = str(path)
        with suppress(WeightsError, NotPlainError, UnusableFileError, OSError), open_regular(source) as file:
            head, size = file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size
            if head.startswith(ZIP):
                networks = self._archived(TorchArchive(file, source), source).networks
                return sum(wanted.layout.num_bytes for _, wanted in networks if isinstance(wanted, CopyPlan))
            if is_safetensors(head, size):
                return self._safetensors_plan(file, source)[0].layout.num_bytes
        return 0

    def _archived(self, archive: TorchArchive, source: str) -> _TorchContents:
        content = archive.pickle_bytes()
        known = self._plan("archive", content)
        if known is None:
            known = self._contents(parse_pickle(content), source)
            self._cache("archive", content, known)
        assert isinstance(known, _TorchContents), "archives have contents"
        return known

    def _contents(self, pickled: Pickled, source: str) -> _TorchContents:
        content, calls = pickled.content, pickled.calls
        if isinstance(content, Opaque) and not pickled.has_storages and content.name not in calls:
            raise NotWeightsError(f"{source} holds no tensors, but an object of class {content.name}; {_ALONE}")
        if calls:
            raise _CallsError(described_call(content, calls))
        choice = choose_networks(content, (TensorReference, Array), source, self._select)
        networks: list[tuple[str | None, CopyPlan | Mapping[str, TensorReference | Array]]] = []
        for key, network in choice.networks:
            check_whole(network.state, network.beside, source)
            plain = [
                value for value in network.state.values() if isinstance(value, TensorReference) and not value.stride
            ]
            is_plain = len(plain) == len(network.state)
            networks.append((key, archive_plan(network.state, source) if is_plain else network.state))
        return _TorchContents(tuple(networks), choice.others)

    def _take(
        self,
        archive: TorchArchive | LegacyArchive | None,
        wanted: CopyPlan | Mapping[str, TensorReference | Array],
        size: int,
        source: str,
    ) -> PackedCheckpoint:
        if isinstance(wanted, CopyPlan):
            assert archive is not None, "a plan is of storages"
            return _copy(archive, wanted, size, source)
        references = [value for value in wanted.values() if isinstance(value, TensorReference)]
        check_expansion(sum(reference.byte_range[1] for reference in references), size, source)
        storages: dict[TorchStorage, Tensor] = {}
        for storage in {reference.storage for reference in references}:
            assert archive is not None, "references are of storages"
            archive.check_storage(storage.key, storage.num_bytes)
            values = bytearray(storage.num_bytes)
            archive.read_storage(storage.key, memoryview(values))
            dtype = getattr(torch, storage.dtype)
            storages[storage] = torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
        return pack({name: _tensor(value, storages) for name, value in wanted.items()}, source)

    def _read_by_torch(self, size: int, source: str, why: NotPlainError) -> ReadNetworks:
        """Reads a file by torch's own safe loader, which supports more kinds of tensors and fewer other values."""
        content = load_pickled(source, str(why) if isinstance(why, _CallsError) else "")
        choice = choose_networks(content, Tensor, source, self._select)
        for _, network in choice.networks:
            check_whole(network.state, network.beside, source)
        # A tensor may repeat one stored value without end.
        states = [network.state for _, network in choice.networks]
        check_expansion(sum(written_bytes(tensor) for state in states for tensor in state.values()), size, source)
        found = [(key, pack(network.state, source)) for key, network in choice.networks]
        return ReadNetworks(tuple(found), choice.others)

    def _safetensors_plan(self, file: BinaryIO, path: str) -> tuple[CopyPlan, int]:
        """Returns what the header of a file describes, and the header's length."""
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 2 <= length <= MAX_HEADER_BYTES else b""
        if len(header) != length or not header:
            raise WeightsError(f"{path} is truncated or no safetensors file; fetch it again")
        plan = self._plan("safetensors", header)
        if not isinstance(plan, CopyPlan):
            plan = safetensors_plan(header, path)
            self._cache("safetensors", header, plan)
        return plan, length

    def _read_safetensors(self, file: BinaryIO, file_bytes: int, path: str) -> PackedCheckpoint:
        plan, length = self._safetensors_plan(file, path)
        size = plan.entries[""]
        if file_bytes != 8 + length + size:
            raise WeightsError(f"{path} does not have the {8 + length + size} bytes its header says; fetch it again")
        for name, one, other, num_bytes in plan.doubles:
            if _bytes_at(file, 8 + length + one, num_bytes) != _bytes_at(file, 8 + length + other, num_bytes):
                raise WeightsError(
                    f"{path}: its metadata tie tensor '{name}' to another one, from which it differs; take that entry "
                    "out of the metadata, or write the file anew"
                )
        if plan.layout.num_bytes == size >= _MAPPED_BYTES and len(plan.copies) == 1:
            # The file holds the packed form as it is. The map is private, so writing to it does not change the file.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            packed_P = np.frombuffer(mapped, dtype=np.uint8, count=size, offset=8 + length)
            return PackedCheckpoint(plan.layout, packed_P, plan.prefix, plan.metadata)
        packed_P = np.zeros(plan.layout.num_bytes, dtype=np.uint8)
        out = packed_P.data
        for copy in plan.copies:
            file.seek(8 + length + copy.source)
            part = out[copy.target : copy.target + copy.num_bytes]
            if file.readinto(part) != copy.num_bytes:  # pyright: ignore[reportAttributeAccessIssue]
                raise WeightsError(f"{path} was cut short while it was read; fetch it again")
        return PackedCheckpoint(plan.layout, packed_P, plan.prefix, plan.metadata)

    def _plan(self, kind: str, content: bytes) -> CopyPlan | _TorchContents | None:
        plan = self._plans.get((kind, content))
        if plan is not None:
            self._plans.move_to_end((kind, content))
        return plan

    def _cache(self, kind: str, content: bytes, plan: CopyPlan | _TorchContents) -> None:
        self._plans[kind, content] = plan
        if len(self._plans) > _MAX_PLANS:
            self._plans.popitem(last=False)


def _copy(archive: TorchArchive | LegacyArchive, plan: CopyPlan, size: int, source: str) -> PackedCheckpoint:
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


def _tensor(value: TensorReference | Array, storages: Mapping[TorchStorage, Tensor]) -> Tensor:
    if isinstance(value, Array):
        return torch.from_numpy(value.values)
    flat = storages[value.storage]
    if 0 in value.shape:
        return flat.new_empty(value.shape)
    stride = value.stride or torch.empty(value.shape, device="meta").stride()
    return flat.as_strided(value.shape, stride, value.offset)


def load_pickled(path: str | Path, why: str = "") -> Any:
    """Loads any torch file by torch's own safe loader.

    Args:
        path: The file.
        why: The reason why the file is unsafe, if known.

    Raises:
        UnsafeFileError: The file asks for more than tensors.
        WeightsError: The file is damaged.
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


def _bytes_at(file: BinaryIO, start: int, num_bytes: int) -> bytes:
    file.seek(start)
    return file.read(num_bytes)
