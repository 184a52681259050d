"""What a torch file (zip format) says of its tensors, read without torch and without running anything.

`torch.load(weights_only=True)` interprets the pickle anew for every file. Checkpoints of one architecture hold the
same pickle byte for byte and differ in storages alone, so it is interpreted once, by a reader that knows only the
few harmless names a `state_dict` needs, and the storages are copied straight from the archive.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import torch

from raywgen.inputs import UnusableFileError, check_zip
from raywgen.weights.errors import WeightsError

_LOCAL_HEADER_BYTES = 30
_LOCAL_HEADER = b"PK\x03\x04"
_FOLDER = 0x10
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage by the name of its entry in the archive."""

    key: str
    dtype: str
    num_values: int

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return self.num_values * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class TensorReference:
    """A contiguous tensor in a storage; `offset` counts values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """As torch names it."""
        return getattr(torch, self.storage.dtype)

    @property
    def byte_range(self) -> tuple[int, int]:
        """First byte in the storage, and their number."""
        size = self.dtype.itemsize
        num_values = 1
        for length in self.shape:
            num_values *= length
        return self.offset * size, num_values * size


class NotPlainError(Exception):
    """The file is no plain archive of contiguous tensors; `torch.load` may know more."""


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, marks: Any = None
) -> TensorReference:
    if marks:
        raise NotPlainError("values to be negated or conjugated")
    if not all(type(number) is int for number in (offset, *shape, *stride)):
        raise NotPlainError("a shape that is no shape")
    contiguous, step = [], 1
    for length in reversed(shape):
        contiguous.insert(0, step)
        step *= max(length, 1)
    # A stride along a length of one or none says nothing.
    differs = any(a != b for a, b, length in zip(stride, contiguous, shape, strict=True) if length > 1)
    reference = TensorReference(storage, offset, tuple(shape))
    if not isinstance(storage, Storage) or differs:
        raise NotPlainError("a tensor is not contiguous")
    if min(offset, *shape, 0) < 0 or sum(reference.byte_range) > storage.num_bytes:
        raise NotPlainError("a tensor reaches beyond its storage")
    return reference


_KNOWN: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


# The pure-Python reader: the C one sizes its memo by a number in the file, which may ask for all memory.
class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise NotPlainError(f"{module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, num_values = pid
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str):
            raise NotPlainError("a storage of another kind")
        if type(num_values) is not int:
            raise NotPlainError("a storage without a size")
        return Storage(key, dtype, num_values)

    def load_build(self: Any) -> None:
        """Drops the attributes (`_metadata`) of a `state_dict`; those of anything else could undo its checks."""
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise NotPlainError("attributes")

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # pyright: ignore[reportAttributeAccessIssue]


def parse_pickle(data: bytes) -> Any:
    """The saved object with a `TensorReference` in each tensor's place.

    Raises:
        NotPlainError: It asks for anything else.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except NotPlainError:
        raise
    except Exception as error:  # damage makes an unpickler raise nearly anything
        raise NotPlainError(str(error)) from error


class TorchArchive:
    """An open torch file in zip format.

    Raises:
        NotPlainError: It is not in zip format, or compressed.
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
        """`data.pkl`."""
        content = bytearray(self._size_of("data.pkl"))
        self.read_into("data.pkl", memoryview(content))
        if "byteorder" in self._entries:
            order = bytearray(self._size_of("byteorder"))
            self.read_into("byteorder", memoryview(order))
            if order != b"little":
                raise NotPlainError("big-endian values")
        return bytes(content)

    def check_storage(self, key: str, num_bytes: int) -> None:
        """Refuses a storage of another size, before memory is asked for.

        Raises:
            WeightsError: The archive does not hold it in full.
        """
        name = f"data/{key}"
        if name not in self._entries or self._size_of(name) != num_bytes:
            raise WeightsError(
                f"{self._source} is damaged: storage {key} does not have {num_bytes} bytes; fetch it again"
            )

    def read_storage(self, key: str, out: memoryview) -> None:
        """Copies a storage.

        Raises:
            WeightsError: Its checksum is another.
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
        WeightsError: One differs, or the file begins as a zip file and is none.
    """
    file.seek(0)
    if file.read(len(_LOCAL_HEADER)) != _LOCAL_HEADER:
        return
    try:
        archive = zipfile.ZipFile(file)
        check_zip(archive.infolist(), file.seek(0, io.SEEK_END), source)
        count = Counter(archive.namelist())
        # torch reads nothing of an entry marked as a folder, and perhaps another one of the same name.
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
