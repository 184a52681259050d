"""Refuses compressed Arrow IPC files before Arrow unpacks them: the record batches of a shard are never compressed.

Arrow expands a compressed buffer to whatever length it claims. The metadata (FlatBuffers) say whether a batch is
compressed, but Arrow's Python interface does not show it.
"""

from __future__ import annotations

import struct

import pyarrow as pa

_MAGIC = b"ARROW1"
_BLOCK_BYTES = 24
_MAX_METADATA_BYTES = 64 << 20
# Indices of fields in the tables of Arrow's format: Footer, Message, RecordBatch.
_DICTIONARIES, _RECORD_BATCHES = 2, 3
_HEADER = 2
_COMPRESSION = 3


def check_uncompressed(file: pa.NativeFile) -> None:
    """Refuses an Arrow file with compressed buffers or dictionaries.

    Raises:
        pyarrow.ArrowInvalid: The file has some, or is no Arrow file.
    """
    try:
        for offset in _record_batches(file):
            if _is_compressed(file, offset):
                raise pa.ArrowInvalid("its buffers are compressed, which those of a shard never are")
    except (struct.error, IndexError) as error:
        raise pa.ArrowInvalid(f"its metadata is damaged ({error})") from error
    finally:
        file.seek(0)


def _record_batches(file: pa.NativeFile) -> list[int]:
    """Returns the offset of each record batch, from the footer."""
    size = file.size()
    tail = _read(file, size - 10, 10)
    (length,) = struct.unpack("<i", tail[:4])
    if tail[4:] != _MAGIC or not 0 < length <= min(size - 10, _MAX_METADATA_BYTES):
        raise pa.ArrowInvalid("it has no footer")
    footer = _Table.root(_read(file, size - 10 - length, length))
    if (place := footer.vector(_DICTIONARIES)) and place[1]:
        raise pa.ArrowInvalid("it holds dictionaries, which a shard never does")
    blocks = footer.vector(_RECORD_BATCHES)
    start, count = blocks or (0, 0)
    rows = (footer.data[start + index * _BLOCK_BYTES :][:8] for index in range(count))
    return [struct.unpack("<q", row)[0] for row in rows]


def _is_compressed(file: pa.NativeFile, offset: int) -> bool:
    mark, length = struct.unpack("<Ii", _read(file, offset, 8))
    if mark != 0xFFFFFFFF:  # Older files have no such mark.
        length, offset = struct.unpack("<i", struct.pack("<I", mark))[0], offset - 4
    if not 0 < length <= _MAX_METADATA_BYTES:
        raise pa.ArrowInvalid("a record batch has no metadata")
    message = _Table.root(_read(file, offset + 8, length))
    header = message.table(_HEADER)
    return header is not None and bool(header.field(_COMPRESSION))


def _read(file: pa.NativeFile, offset: int, length: int) -> bytes:
    if not 0 <= offset <= file.size() - length:
        raise pa.ArrowInvalid("it is cut short")
    file.seek(offset)
    return file.read(length)


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
