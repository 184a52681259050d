"""Writes safetensors block by block and reads ranges of their values, so that nothing has to hold a whole file.

Both take open files of `pyarrow`, so that a file may lie on a local disk or in an object store.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raywgen.files import in_one_step, remedy
from raywgen.inputs import parse_json
from raywgen.weights.copy_plan import DTYPE_NAMES
from raywgen.weights.errors import WeightsError

if TYPE_CHECKING:
    from pyarrow import NativeFile

BLOCK_BYTES = 1 << 23
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 256 << 20
_DTYPES = {code: getattr(torch, name) for code, name in DTYPE_NAMES.items() if hasattr(torch, name)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_HALF_BYTES = "F4"


class SafetensorsError(ValueError):
    """A file that is no safetensors file, or is damaged; the message says how."""


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """A tensor that is written block by block.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        blocks: Returns its values in order, as tensors of any shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> StreamedTensor:
        """Returns a tensor that lies in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor in a file.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        start: Place of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_stream(
    write: Callable[[Any], object], tensors: Mapping[str, StreamedTensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file block by block; equal content gives equal bytes.

    Args:
        write: Takes the bytes of the file in order, in blocks of about `BLOCK_BYTES` at most.
        tensors: The tensors, in the order of the header.
        metadata: Metadata for the header; `format: pt`, which loaders require, is added.
    """
    # As the library does, so that every tensor begins at a multiple of the bytes of its values.
    placed = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    starts, place = {}, 0
    for name, tensor in placed:
        starts[name], place = place, place + tensor.num_bytes
    rows: dict[str, Any] = {_METADATA: dict(sorted({"format": "pt", **metadata}.items()))}
    for name, tensor in tensors.items():
        offsets = [starts[name], starts[name] + tensor.num_bytes]
        rows[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    header = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write(_LENGTH.pack(len(header)) + header)
    for name, tensor in placed:
        written = 0
        for block in tensor.blocks():
            for piece in block.detach().contiguous().view(-1).view(torch.uint8).split(BLOCK_BYTES):
                write(piece.numpy().data)
                written += len(piece)
        assert written == tensor.num_bytes, f"'{name}' gave {written} of its {tensor.num_bytes} bytes"


def save_streamed(tensors: Mapping[str, StreamedTensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file block by block, and in one step: a reader sees the whole file or none.

    Raises:
        WeightsError: The disk is full or the folder cannot be written; no partial file remains.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_one_step(path) as partial, partial.open("wb") as file:
            write_stream(file.write, tensors, metadata)
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error}; {remedy(error)} and run the same command again") from error


def read_header(source: NativeFile) -> dict[str, StoredTensor]:
    """Returns the places of the tensors in a file, in the order of its bytes.

    Raises:
        SafetensorsError: The file is truncated, damaged, or of another kind.
    """
    size = source.size()
    try:
        source.seek(0)
        (length,) = _LENGTH.unpack(source.read(_LENGTH.size))
        if length > min(_MAX_HEADER_BYTES, size - _LENGTH.size):
            raise ValueError(f"its header claims {length} bytes")
        content = parse_json(source.read(length))
        content.pop(_METADATA, None)
        begin = _LENGTH.size + length
        found = {str(name): _stored_tensor(row, begin) for name, row in content.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorsError(f"it is no safetensors file ({error})") from error
    placed = sorted(found.items(), key=lambda item: (item[1].start, item[1].num_bytes))
    for name, tensor in placed:
        if tensor.start != begin:
            raise SafetensorsError(f"'{name}' does not begin where the tensor before it ends")
        begin += tensor.num_bytes
    if begin != size:
        raise SafetensorsError(f"it has {size} bytes, and its header speaks of {begin}")
    return dict(placed)


def _stored_tensor(row: Mapping[str, Any], begin: int) -> StoredTensor:
    dtype, shape, (start, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    if dtype not in _DTYPES or dtype == _HALF_BYTES:
        raise ValueError(f"dtype {dtype} is not known")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a size or place is no number")
    tensor = StoredTensor(_DTYPES[dtype], shape, begin + start)
    if tensor.num_bytes != end - start:
        raise ValueError("a tensor has another size than its shape")
    return tensor


def read_values(source: NativeFile, tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Reads the values `[start, stop)` of a flat tensor.

    Raises:
        SafetensorsError: The file ends before.
    """
    values = torch.empty(stop - start, dtype=tensor.dtype)
    read_into(source, tensor, start, values)
    return values


def read_into(source: NativeFile, tensor: StoredTensor, start: int, values: Tensor) -> None:
    """Reads the values of a flat tensor from `start` into a flat, contiguous one on the CPU.

    Raises:
        SafetensorsError: The file ends before.
    """
    source.seek(tensor.start + start * tensor.dtype.itemsize)
    target, place = values.view(torch.uint8).numpy().data, 0
    while place < len(target):
        num = source.readinto(target[place : place + BLOCK_BYTES])
        if not num:
            raise SafetensorsError("it ends before its last value")
        place += num


def stored_names(path: Path) -> list[str]:
    """Returns the names of the tensors that a safetensors file holds; raises as `read_header` does."""
    from pyarrow import OSFile  # Late: most users of this module bring open files.

    with OSFile(str(path), "rb") as source:
        return list(read_header(source))


def overwrite_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes values over those of stored tensors, in their dtype; no other byte of the file changes.

    Args:
        path: A safetensors file.
        tensors: New values by name, in the stored shapes.

    Raises:
        SafetensorsError: The file is damaged, or has no such tensor.
        WeightsError: A finite value is beyond the range of the stored dtype.
        OSError: The file cannot be written.
    """
    from pyarrow import OSFile

    with OSFile(str(path), "rb") as source:
        places = read_header(source)
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            if name not in places or places[name].shape != tuple(tensor.shape):
                raise SafetensorsError(f"it holds no tensor '{name}' of shape {list(tensor.shape)}")
            values = in_dtype(tensor.detach().cpu(), places[name].dtype, name).contiguous()
            file.seek(places[name].start)
            file.write(values.view(-1).view(torch.uint8).numpy().data)


def in_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns finite values in another dtype.

    Raises:
        WeightsError: A value is beyond its range.
    """
    values = tensor.to(dtype)
    if not bool(values.isfinite().all()):
        raise WeightsError(
            f"a value of '{name}' is {float(tensor.abs().max()):.3g}, beyond the range of {dtype}; convert the network "
            "to float32 or bfloat16 first"
        )
    return values


def blocks_of(source: NativeFile) -> Iterator[tuple[str, Tensor]]:
    """Reads a whole file in order, block by block, each with the name of its tensor; the header has an empty name.

    Raises:
        SafetensorsError: The file is damaged or of another kind.
    """
    tensors = read_header(source)
    begin = min((tensor.start for tensor in tensors.values()), default=source.size())
    source.seek(0)
    yield "", torch.frombuffer(bytearray(source.read(begin)), dtype=torch.uint8)
    for name, tensor in tensors.items():
        num, step = math.prod(tensor.shape), BLOCK_BYTES // tensor.dtype.itemsize
        for start in range(0, num, step):
            yield name, read_values(source, tensor, start, min(start + step, num))
