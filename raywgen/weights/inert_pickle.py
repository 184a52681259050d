"""Reads pickles without running anything: tensors become references, everything else becomes an inert placeholder.

Nothing that a pickle names is ever imported or called. Everything that torch writes for a `state_dict` is understood;
objects of other classes become `Opaque`, and calls of unknown functions are recorded instead of made.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

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
# Harmless values are pickled as calls of these. They are not recorded as unknown calls, and not made either.
_DATA_MODULES = ("numpy", "pathlib", "datetime", "collections", "decimal", "fractions", "uuid", "copyreg", "argparse")
_DATA_BUILTINS = (
    "set",
    "frozenset",
    "complex",
    "bytearray",
    "slice",
    "range",
    "list",
    "dict",
    "tuple",
    "int",
    "object",
)
_DATA_TORCH = ("Size", "device")
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_ARRAY_KINDS = "fiucb"
_MAX_PLACES = 100_000


class NotPlainError(Exception):
    """The file is no plain archive of strided tensors; `torch.load` may be able to read it."""


@dataclass(frozen=True, slots=True)
class TorchStorage:
    """A storage, referred to by the name of its entry in the archive."""

    key: str
    dtype: str
    num_values: int

    @property
    def num_bytes(self) -> int:
        """Number of bytes of its values."""
        return self.num_values * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class TensorReference:
    """A tensor in a storage; `offset` and `stride` count values, and no stride means a contiguous tensor."""

    storage: TorchStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as an object of torch."""
        return getattr(torch, self.storage.dtype)

    @property
    def byte_range(self) -> tuple[int, int]:
        """First byte in the storage, and the number of bytes of a contiguous tensor."""
        size = self.dtype.itemsize
        num_values = 1
        for length in self.shape:
            num_values *= length
        return self.offset * size, num_values * size


@dataclass(slots=True, eq=False)
class Opaque:
    """An object of a class that is not looked up; `entries` holds what a mapping or list of that class would hold."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Adds a value, as `list.append` and `set.add` do."""
        self.entries[len(self.entries)] = value

    add = append

    def extend(self, values: Any) -> None:
        """Adds values, as `list.extend` and `set.update` do."""
        for value in values:
            self.append(value)

    update = extend


class Array(Opaque):
    """A NumPy array, whose values lie in the pickle."""

    __slots__ = ()

    @property
    def values(self) -> np.ndarray:
        """A copy of the array's values.

        Raises:
            NotPlainError: The array is damaged, or does not hold numbers.
        """
        try:
            _, shape, kind, is_fortran, values = self.state
            dtype = np.dtype(str(kind.arguments[0])).newbyteorder(">" if kind.state[1] == ">" else "<")
            if dtype.kind not in _ARRAY_KINDS or not isinstance(values, bytes):
                raise NotPlainError("an array of no numbers")
            found = np.frombuffer(values, dtype).reshape(shape, order="F" if is_fortran else "C")
            return np.array(found, dtype.newbyteorder("="), order="C")
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise NotPlainError("a damaged array") from error

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as an object of torch."""
        return torch.from_numpy(self.values[:0] if self.values.ndim else self.values).dtype


@dataclass(frozen=True, slots=True)
class _Global:
    """A global name that is not looked up; calling it creates an `Opaque`."""

    name: str
    calls: list[str]

    def __call__(self, *arguments: Any) -> Any:
        module, _, name = self.name.rpartition(".")
        root = module.partition(".")[0]
        if self.name == "_codecs.encode" and arguments and type(arguments[0]) is str and arguments[1:] == ("latin1",):
            return arguments[0].encode("latin1")
        is_data = (
            root in _DATA_MODULES
            or (module == "builtins" and name in _DATA_BUILTINS)
            or (module == "torch" and name in _DATA_TORCH)
        )
        if not is_data:
            self.calls.append(self.name)
        kind = Array if root == "numpy" and name == "_reconstruct" else Opaque
        return kind(self.name, arguments)


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
    if not isinstance(storage, TorchStorage) or min(offset, *shape, *stride, 0) < 0:
        raise NotPlainError("a tensor of no storage or at no place")
    # The stride of a dimension of length 0 or 1 has no meaning.
    differs = any(a != b for a, b, length in zip(stride, contiguous, shape, strict=True) if length > 1)
    if differs and 0 not in shape:
        last = offset + sum((length - 1) * jump for length, jump in zip(shape, stride, strict=True))
        if last >= storage.num_values:
            raise NotPlainError("a tensor reaches beyond its storage")
        return TensorReference(storage, offset, tuple(shape), tuple(stride))
    reference = TensorReference(storage, offset, tuple(shape))
    if sum(reference.byte_range) > storage.num_bytes:
        raise NotPlainError("a tensor reaches beyond its storage")
    return reference


def _rebuild_of_dtype(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, marks: Any = None
) -> TensorReference:
    if not isinstance(storage, TorchStorage) or not isinstance(dtype, _Dtype):
        raise NotPlainError("a tensor of no storage")
    size = getattr(torch, dtype.name).itemsize
    if storage.dtype != "uint8" or storage.num_values % size:
        raise NotPlainError("a storage of another dtype")
    typed = TorchStorage(storage.key, dtype.name, storage.num_values // size)
    return _rebuild_tensor(typed, offset, shape, stride, grad, hooks, marks)


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: OrderedDict(),
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_of_dtype,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "UntypedStorage"): "uint8",
    ("torch.storage", "UntypedStorage"): "uint8",
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", name): _Dtype(name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
}


# The pure-Python unpickler: the C one sizes its memo by a number in the file, which may exceed the memory.
class InertUnpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Unpickler that imports and calls nothing.

    Attributes:
        calls: Names of the unknown functions that the pickle asks to call.
        storages: All storages that the pickle names, by key.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.calls: list[str] = []
        self.storages: dict[str, TorchStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns the placeholder for a name; nothing is imported."""
        module = _OLD_MODULES.get(module, module)
        known = _KNOWN.get((module, name))
        return _Global(f"{module}.{name}", self.calls) if known is None else known

    def persistent_load(self, pid: Any) -> TorchStorage:
        """Returns the storage that torch's persistent id describes."""
        kind, dtype, key, _, num_values, *view = pid
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str) or (view and view != [None]):
            raise NotPlainError("a storage of another kind")
        if type(num_values) is not int:
            raise NotPlainError("a storage without a size")
        found = TorchStorage(key, dtype, num_values)
        self.storages.setdefault(key, found)
        return found

    def load_build(self: Any) -> None:
        """Drops the attributes (`_metadata`) of a `state_dict`; others are refused, as they could undo checks."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Opaque):
            self.stack[-1].state = state
        elif type(self.stack[-1]) is not OrderedDict:
            raise NotPlainError("attributes")

    def load_newobj(self: Any) -> None:
        """Creates a placeholder for an object of a class that is not looked up."""
        self.stack.pop()
        self._push_object(self.stack.pop())

    def load_newobj_ex(self: Any) -> None:
        """Does the same with named arguments."""
        self.stack.pop()
        self.load_newobj()

    def _push_object(self: Any, kind: Any) -> None:
        if kind is OrderedDict:
            self.append(OrderedDict())
        elif type(kind) is _Global:
            self.append(Opaque(kind.name))
        else:
            raise NotPlainError("an object of no class")

    dispatch: ClassVar = {  # pyright: ignore[reportIncompatibleVariableOverride]
        **pickle._Unpickler.dispatch,  # pyright: ignore[reportAttributeAccessIssue]
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
    }


@dataclass(frozen=True, slots=True)
class Pickled:
    """The content of a pickle.

    Attributes:
        content: The saved object with a `TensorReference` in each tensor's place.
        calls: Names of the unknown functions that it asks to call.
        has_storages: Whether it refers to the values of any tensor.
    """

    content: Any
    calls: list[str]
    has_storages: bool


def parse_pickle(data: bytes) -> Pickled:
    """Reads a whole pickle.

    Raises:
        NotPlainError: The pickle is damaged, or its tensors are of an unknown kind.
    """
    reader = InertUnpickler(io.BytesIO(data))
    content = load_inert(reader)
    return Pickled(content, reader.calls, bool(reader.storages))


def load_inert(reader: InertUnpickler) -> Any:
    """Reads the next object of a stream; raises `NotPlainError` as `parse_pickle` does."""
    try:
        return reader.load()
    except NotPlainError:
        raise
    except Exception as error:  # damage makes an unpickler raise nearly anything
        raise NotPlainError(str(error)) from error


def described_call(content: Any, calls: list[str]) -> str:
    """Describes the first unknown call of a pickle, and the key under which it stands."""
    waiting: list[tuple[str, Any]] = [("", content)]
    for key, value in waiting:
        if isinstance(value, Opaque) and value.name in calls:
            where = f"under '{key}' " if key else ""
            return f"{where}a call of {value.name}"
        inner = value.entries if isinstance(value, Opaque) else value
        if isinstance(inner, list | tuple):
            inner = dict(enumerate(inner))
        if isinstance(inner, dict) and len(waiting) < _MAX_PLACES:
            waiting += [(f"{key}.{name}" if key else str(name), inner[name]) for name in inner]
    return f"a call of {calls[0]}"
