"""Writes the values of a network part by part into safetensors files, each at its place, in any order.

A file is made in full size first, so that a disk without room for it is known at once. Its header is written last: only
then are all metadata known, and nothing takes an unfinished file for a network.

Shape letters beyond the legend in `raywgen.weights`: X values of a part.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from raywgen.files import sync
from raywgen.weights.copy_plan import DTYPE_NAMES
from raywgen.weights.errors import WeightsError
from raywgen.weights.layout import Layout
from raywgen.weights.tensors import TensorSpec

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorFile:
    """Some tensors of a layout as one safetensors file holds them.

    Attributes:
        layout: The layout.
        specs: The tensors in the file, in the order of its header.
        header_bytes: Room for the header.
    """

    layout: Layout
    specs: tuple[TensorSpec, ...]
    header_bytes: int

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The first byte of each tensor after the header, by name; wide elements come first, as they are aligned so."""
        found, end = {}, 0
        for spec in sorted(self.specs, key=lambda spec: (-spec.torch_dtype.itemsize, spec.name)):
            found[spec.name] = end
            end += _size(spec)
        return found

    @property
    def num_data_bytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(_size(spec) for spec in self.specs)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the file."""
        return _LENGTH.size + self.header_bytes + self.num_data_bytes

    def create(self, path: Path) -> None:
        """Creates the file in full size, without a header.

        Raises:
            OSError: There is no room for it, or it cannot be written; no file remains.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.num_bytes)
                else:
                    file.truncate(self.num_bytes)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def write_values(self, path: Path, start: int, values_X: Tensor, on_content: Callable[[memoryview], None]) -> None:
        """Writes consecutive values of the flat vector, from value `start` on, as far as the file holds them.

        Args:
            path: The file.
            start: The first value.
            values_X: The values.
            on_content: Called with all bytes that are written, in the order of `read_values`.

        Raises:
            OSError: The file cannot be written.
        """
        with path.open("r+b") as file:
            for places, part in self._parts(start, start + len(values_X)):
                content = _content(values_X[part.values], part.dtype)
                for place in places:
                    file.seek(place)
                    file.write(content)
                    on_content(content)

    def read_values(self, path: Path, start: int, stop: int) -> Iterator[bytes]:
        """Yields the bytes that `write_values` wrote for a part of the flat vector, tensor after tensor.

        Raises:
            OSError: The file cannot be read.
        """
        with path.open("rb") as file:
            for places, part in self._parts(start, stop):
                for place in places:
                    file.seek(place)
                    yield file.read(part.num_bytes)

    def finish(self, path: Path, kept: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Writes the tensors that no generator writes, and the header; then all of the file is on the disk.

        Args:
            path: The file.
            kept: These tensors; missing ones stay zero.
            metadata: Metadata for the header.

        Raises:
            OSError: The file cannot be written.
        """
        with path.open("r+b") as file:
            for spec in self.specs:
                owner = spec.tied_to or spec.name
                if owner in kept and not self._spec(owner).is_generated:
                    file.seek(self._start(spec))
                    file.write(_content(kept[owner].detach().reshape(-1), spec.torch_dtype))
            header = _header(self.specs, self.offsets, metadata)
            assert len(header) <= self.header_bytes, "room was left for the longest metadata"
            file.seek(0)
            file.write(_LENGTH.pack(self.header_bytes) + header.ljust(self.header_bytes))
        sync(path)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[list[int], _Part]]:
        """Yields the places in the file, and the part, of each tensor that some values of the flat vector touch."""
        value = 0
        for spec in self.layout.generated:
            first, last = max(start, value), min(stop, value + spec.num_values)
            names = [name for name in self._names_of[spec.name] if name in self.offsets] if first < last else []
            if names:
                dtype = _real(spec.torch_dtype)
                inside = (first - value) * dtype.itemsize
                places = [_LENGTH.size + self.header_bytes + self.offsets[name] + inside for name in names]
                yield places, _Part(slice(first - start, last - start), dtype)
            value += spec.num_values

    def _start(self, spec: TensorSpec) -> int:
        return _LENGTH.size + self.header_bytes + self.offsets[spec.name]

    def _spec(self, name: str) -> TensorSpec:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.layout.tensors}

    @cached_property
    def _names_of(self) -> dict[str, list[str]]:
        """All names under which each tensor is stored."""
        names: dict[str, list[str]] = {}
        for spec in self.layout.tensors:
            names.setdefault(spec.tied_to or spec.name, []).append(spec.name)
        return names


@dataclass(frozen=True, slots=True)
class _Part:
    values: slice
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return (self.values.stop - self.values.start) * self.dtype.itemsize


def tensor_files(layout: Layout, longest: Mapping[str, str], max_bytes: int = 0) -> list[TensorFile]:
    """Returns the files that hold a network: one, or several in the order of its tensors.

    Args:
        layout: Layout of the network.
        longest: Metadata as long as the longest that the files may get.
        max_bytes: Most bytes of the tensors of a file; a larger tensor has a file of its own. 0 puts all into one.

    Raises:
        WeightsError: Safetensors have no such dtype.
    """
    specs = [spec for _, spec in layout.packed_order]
    for spec in specs:
        if spec.dtype not in _NAMES_OF_DTYPES:
            raise WeightsError(f"safetensors hold no {spec.dtype} (tensor '{spec.name}'); convert it first")
    runs: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if max_bytes and runs[-1] and size + _size(spec) > max_bytes:
            runs.append([])
            size = 0
        runs[-1].append(spec)
        size += _size(spec)
    metadata = dict(longest) | layout_ties(layout)
    files = [TensorFile(layout, tuple(run), 0) for run in runs]
    lengths = [len(_header(file.specs, file.offsets, metadata)) for file in files]
    return [
        TensorFile(layout, file.specs, -(-length // _ALIGNMENT) * _ALIGNMENT)
        for file, length in zip(files, lengths, strict=True)
    ]


def layout_ties(layout: Layout) -> dict[str, str]:
    """Returns for each name of a tied tensor, but the first in the file, that first name, as `save_state_dict` does."""
    first: dict[str, str] = {}
    ties = {}
    for _, spec in layout.packed_order:
        if not spec.num_values:
            continue
        owner = first.setdefault(spec.tied_to or spec.name, spec.name)
        if owner != spec.name:
            ties[spec.name] = owner
    return ties


def index_json(names: Sequence[str], files: Sequence[TensorFile]) -> str:
    """Returns the content of `model.safetensors.index.json`, as the Hugging Face hub has it.

    Args:
        names: Names of the files.
        files: The files.
    """
    places = {spec.name: name for name, file in zip(names, files, strict=True) for spec in file.specs}
    total = sum(file.num_data_bytes for file in files)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def values_checksum(files: Sequence[TensorFile], paths: Sequence[Path], start: int, stop: int) -> str:
    """Returns the SHA-256 of a part of the flat vector as files hold it.

    Raises:
        OSError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for file, path in zip(files, paths, strict=True):
        for content in file.read_values(path, start, stop):
            digest.update(content)
    return digest.hexdigest()


def _size(spec: TensorSpec) -> int:
    return spec.torch_dtype.itemsize * spec.num_values // (2 if spec.torch_dtype.is_complex else 1)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _content(values_X: Tensor, dtype: torch.dtype) -> memoryview:
    """Returns values, real ones in pairs where the dtype is complex, as the bytes of a file."""
    return values_X.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(specs: Sequence[TensorSpec], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(sorted(({"format": "pt"} | dict(metadata)).items()))}
    for spec in specs:
        start, shape = offsets[spec.name], list(spec.shape)
        if spec.dtype == "float4_e2m1fn_x2" and shape:
            shape[-1] *= 2  # The file counts values, and torch pairs of them.
        content[spec.name] = {
            "dtype": _NAMES_OF_DTYPES[spec.dtype],
            "shape": shape,
            "data_offsets": [start, start + _size(spec)],
        }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
