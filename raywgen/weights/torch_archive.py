"""Reads the pickle and the storages of a torch file in zip format, without torch.

`torch.load(weights_only=True)` interprets the pickle anew for every file. Checkpoints of one architecture hold the
same pickle byte for byte and differ only in their storages, so it is interpreted once (see `inert_pickle`), and the
storages are copied straight from the archive.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import Counter
from typing import BinaryIO

from raywgen.inputs import UnusableFileError, check_zip
from raywgen.weights.errors import WeightsError
from raywgen.weights.inert_pickle import NotPlainError

_LOCAL_HEADER_BYTES = 30
_LOCAL_HEADER = b"PK\x03\x04"
_FOLDER = 0x10


class TorchArchive:
    """An open torch file in zip format.

    Raises:
        NotPlainError: The file is not in zip format, or is compressed.
    """

    def __init__(self, file: BinaryIO, source: str) -> None:
        self._file = file
        self._source = source
        self._size = file.seek(0, io.SEEK_END)
        try:
            entries = zipfile.ZipFile(file).infolist()
        except Exception as error:  # damage makes zipfile raise nearly anything
            raise NotPlainError(str(error)) from error
        check_zip(entries, self._size, source)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise NotPlainError("an entry is compressed")
        roots = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(roots) != 1:
            raise NotPlainError("no data.pkl")
        root = roots[0].removesuffix("data.pkl")
        self._entries = {entry.filename.removeprefix(root): entry for entry in entries}

    def pickle_bytes(self) -> bytes:
        """Reads the content of `data.pkl`."""
        content = bytearray(self._size_of("data.pkl"))
        self.read_into("data.pkl", memoryview(content))
        if "byteorder" in self._entries:
            order = bytearray(self._size_of("byteorder"))
            self.read_into("byteorder", memoryview(order))
            if order != b"little":
                raise NotPlainError("big-endian values")
        return bytes(content)

    def check_storage(self, key: str, num_bytes: int) -> None:
        """Refuses a storage of another size, before memory is allocated.

        Raises:
            WeightsError: The archive does not hold the whole storage.
        """
        name = f"data/{key}"
        if name not in self._entries or self._size_of(name) != num_bytes:
            raise WeightsError(
                f"{self._source} is damaged: storage {key} does not have {num_bytes} bytes; fetch it again"
            )

    def read_storage(self, key: str, out: memoryview) -> None:
        """Copies the values of a storage.

        Raises:
            WeightsError: Its checksum is wrong.
        """
        self.read_into(f"data/{key}", out)

    def read_into(self, name: str, out: memoryview) -> None:
        """Copies an entry and compares its checksum."""
        entry = self._entries[name]
        self._file.seek(min(max(entry.header_offset, 0), self._size))
        header = self._file.read(_LOCAL_HEADER_BYTES)
        if len(header) == _LOCAL_HEADER_BYTES and header.startswith(_LOCAL_HEADER):
            name_bytes, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
            self._file.seek(name_bytes + extra, io.SEEK_CUR)
            if self._file.readinto(out) == len(out) and zlib.crc32(out) == entry.CRC:  # pyright: ignore[reportAttributeAccessIssue]
                return
        raise WeightsError(f"{self._source} is truncated or damaged at '{name}'; fetch it again")

    def _size_of(self, name: str) -> int:
        size = self._entries[name].file_size
        if size > self._size:
            raise WeightsError(
                f"{self._source} is damaged: '{name}' claims more bytes than the file has; fetch it again"
            )
        return size


def check_entries(file: BinaryIO, source: str) -> None:
    """Compares every entry of a file in zip format with its checksum, as `torch.load` does not.

    Raises:
        WeightsError: A checksum differs, or the file begins as a zip file and is none.
    """
    file.seek(0)
    if file.read(len(_LOCAL_HEADER)) != _LOCAL_HEADER:
        return
    try:
        archive = zipfile.ZipFile(file)
        check_zip(archive.infolist(), file.seek(0, io.SEEK_END), source)
        count = Counter(archive.namelist())
        # torch ignores entries marked as folders, and may read another entry of the same name.
        doubtful = (
            entry.filename
            for entry in archive.infolist()
            if count[entry.filename] > 1 or (entry.file_size and entry.external_attr & _FOLDER)
        )
        damaged = next(doubtful, None) or archive.testzip()
    except UnusableFileError:
        raise
    except Exception as error:  # damage makes zipfile raise nearly anything
        raise WeightsError(f"{source} is truncated or damaged ({error}); fetch it again") from error
    if damaged is not None:
        raise WeightsError(f"{source} is truncated or damaged at '{damaged}'; fetch it again")
