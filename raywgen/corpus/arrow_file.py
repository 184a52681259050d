"""Reads the metadata of Arrow IPC files: whether they are compressed, and where the values of a column lie.

Compressed files are refused before Arrow unpacks them: the record batches of a shard are never compressed.

Arrow expands a compressed buffer to whatever length it claims. The metadata (FlatBuffers) say whether a batch is
compressed, but Arrow's Python interface does not show it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

_MAGIC = b"ARROW1"
_BLOCK_BYTES = 24
_MAX_METADATA_BYTES = 64 << 20
# Indices of fields in the tables of Arrow's format: Footer, Message, RecordBatch.
_DICTIONARIES, _RECORD_BATCHES = 2, 3
_HEADER = 2
_BUFFERS, _COMPRESSION = 2, 3
# A column of strings or bytes has a bitmap, offsets and values.
_BUFFERS_OF_A_COLUMN = 3
_TAIL_BYTES = 1 << 16
_HEADER_BYTES = 1 << 12
_Read = Callable[[int, int], bytes]
"""Reads bytes of a file, given the first one and their number."""


@dataclass(frozen=True, slots=True)
class BodyPart:
    """The values of a column in one record batch.

    Attributes:
        start: Where they begin in the file.
        num_bytes: Their length.
    """

    start: int
    num_bytes: int


def check_uncompressed(file: pa.NativeFile) -> None:
    """Refuses an Arrow file with compressed buffers or dictionaries.

    Raises:
        pyarrow.ArrowInvalid: The file has some, or is no Arrow file.
    """
    size = file.size()

    def read(start: int, num: int) -> bytes:
        file.seek(_inside(start, num, size))
        return file.read(num)

    try:
        for offset, _ in _record_batches(read, size):
            _header(read, offset, size)
    except (struct.error, IndexError) as error:
        raise pa.ArrowInvalid(f"its metadata is damaged ({error})") from error
    finally:
        file.seek(0)


def data_parts(file: pa.NativeFile, column: int) -> list[BodyPart]:
    """Returns where the values of a column of strings or bytes lie, one part a record batch; reads metadata alone.

    Few reads suffice, and none moves the file's position, so threads may share the file.

    Args:
        file: An Arrow file whose columns are all of strings or bytes.
        column: Number of the column.

    Raises:
        pyarrow.ArrowInvalid: The file is compressed, or no Arrow file.
    """
    size = file.size()
    before_tail = max(0, size - _TAIL_BYTES)
    tail = file.read_at(size - before_tail, before_tail)

    def read(start: int, num: int) -> bytes:
        if _inside(start, num, size) >= before_tail:
            return tail[start - before_tail : start - before_tail + num]
        return file.read_at(num, start)

    try:
        parts = []
        for offset, metadata_bytes in _record_batches(read, size):
            header = _header(read, offset, size)
            place, count = header.vector(_BUFFERS) or (0, 0)
            wanted = (column + 1) * _BUFFERS_OF_A_COLUMN - 1
            if wanted >= count:
                raise pa.ArrowInvalid(f"it has no column {column}")
            start, num_bytes = struct.unpack_from("<qq", header.data, place + 16 * wanted)
            start += offset + metadata_bytes
            parts.append(BodyPart(_inside(start, num_bytes, size), num_bytes))
        return parts
    except (struct.error, IndexError) as error:
        raise pa.ArrowInvalid(f"its metadata is damaged ({error})") from error


def _record_batches(read: _Read, size: int) -> list[tuple[int, int]]:
    """Returns the offset of each record batch and the length of its metadata, from the footer."""
    tail = read(size - 10, 10)
    (length,) = struct.unpack("<i", tail[:4])
    if tail[4:] != _MAGIC or not 0 < length <= min(size - 10, _MAX_METADATA_BYTES):
        raise pa.ArrowInvalid("it has no footer")
    footer = _Table.root(read(size - 10 - length, length))
    if (place := footer.vector(_DICTIONARIES)) and place[1]:
        raise pa.ArrowInvalid("it holds dictionaries, which a shard never does")
    blocks = footer.vector(_RECORD_BATCHES)
    start, count = blocks or (0, 0)
    return [struct.unpack_from("<qi", footer.data, start + index * _BLOCK_BYTES) for index in range(count)]


def _header(read: _Read, offset: int, size: int) -> _Table:
    """Reads the description of a record batch.

    Raises:
        pyarrow.ArrowInvalid: It is compressed, or has none.
    """
    first = read(offset, max(8, min(_HEADER_BYTES, size - offset)))
    mark, length = struct.unpack_from("<Ii", first)
    if mark != 0xFFFFFFFF:  # Older files have no such mark.
        length, offset, first = struct.unpack("<i", struct.pack("<I", mark))[0], offset - 4, first[:0]
    if not 0 < length <= _MAX_METADATA_BYTES:
        raise pa.ArrowInvalid("a record batch has no metadata")
    content = first[8 : 8 + length] if 8 + length <= len(first) else read(offset + 8, length)
    header = _Table.root(content).table(_HEADER)
    if header is None:
        raise pa.ArrowInvalid("a record batch has no metadata")
    if header.field(_COMPRESSION):
        raise pa.ArrowInvalid("its buffers are compressed, which those of a shard never are")
    return header


def _inside(start: int, num: int, size: int) -> int:
    """Returns the start of a part of a file that lies within it."""
    if num < 0 or not 0 <= start <= size - num:
        raise pa.ArrowInvalid("it is cut short")
    return start


class _Table:
    """A FlatBuffers table: little-endian, with the offset of each field, 0 for a missing one."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self._at = data, at
        (back,) = struct.unpack_from("<i", data, at)
        self._fields = at - back
        if self._fields < 0:
            raise IndexError("a table lies outside")
        (self._length,) = struct.unpack_from("<H", data, self._fields)

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def field(self, index: int) -> int:
        """Returns the offset of a field, or 0."""
        place = 4 + 2 * index
        if place + 2 > self._length:
            return 0
        (offset,) = struct.unpack_from("<H", self.data, self._fields + place)
        return self._at + offset if offset else 0

    def table(self, index: int) -> _Table | None:
        at = self.field(index)
        return _Table(self.data, at + struct.unpack_from("<I", self.data, at)[0]) if at else None

    def vector(self, index: int) -> tuple[int, int] | None:
        """Returns the offset of a list's first element, and the number of elements."""
        at = self.field(index)
        if not at:
            return None
        start = at + struct.unpack_from("<I", self.data, at)[0]
        return start + 4, struct.unpack_from("<I", self.data, start)[0]
