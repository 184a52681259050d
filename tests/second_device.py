"""A stand-in for a second device, for machines that have one processor and no other.

Its tensors say that they are on `meta` and keep their values on the CPU, out of reach: an operation on them and on a
tensor of the CPU raises, as it does on a GPU. Unlike tensors that are truly on `meta` they have values, so that code
runs whose course depends on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
_aten = torch.ops.aten
# Operations that bring values from one device to another.
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_READS = (_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default)


class DevicesDifferError(RuntimeError):
    """An operation met tensors of both devices."""


class SecondDeviceTensor(Tensor):
    """A tensor of the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> SecondDeviceTensor:
        tensor = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.held = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor of the second device has no NumPy array; use .cpu() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = SecondDeviceTensor(self.held.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, **_: Any) -> str:
        return f"SecondDeviceTensor({self.held})"


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class SecondDevice(_Operations):
    """Within this context, and in threads that begin in it, there is a second device, by the name of `meta`.

    Attributes:
        num_reads: Times that the CPU asked for a value, each of which makes it wait for a real device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self._constants = _Constants()

    def __enter__(self) -> Self:
        self._constants.__enter__()
        super().__enter__()
        self._run_thread = threading.Thread.run
        threading.Thread.run = _in_threads(self._run_thread)  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def __exit__(self, *error: Any) -> None:
        threading.Thread.run = self._run_thread
        super().__exit__(*error)
        self._constants.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _READS and any(isinstance(tensor, SecondDeviceTensor) for tensor in _tensors(args)):
            self.num_reads += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def _in_threads(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Returns `Thread.run` as it is with a second device; torch's own modes end at the bounds of a thread."""

    def run_there(self: threading.Thread) -> None:
        with _Constants(), _Operations():
            run(self)

    return run_there


class _Constants(TorchFunctionMode):
    """Makes tensors of numbers on the CPU and then brings them over; torch itself would forget the numbers."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = list(_tensors((args, kwargs)))
    others = [tensor for tensor in tensors if not isinstance(tensor, SecondDeviceTensor)]
    is_second = len(others) < len(tensors)
    if is_second and func not in _COPIES and (strange := [tensor for tensor in others if tensor.dim() > 0]):
        shapes = [tuple(tensor.shape) for tensor in strange]
        raise DevicesDifferError(f"{func}: tensors of both devices; on the CPU are those of shapes {shapes}")
    if func is _aten._fused_sdp_choice.default and is_second:
        return 0  # Attention by plain operations; those for one kind of device know no stand-in.
    if (device := kwargs.get("device")) is not None:
        is_second = torch.device(device) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*_mapped(_values, args), **_mapped(_values, kwargs))
    if func._schema.is_mutable:
        # The arguments that were changed stand in place of the results, so that they keep their identity.
        given = {id(_values(tensor)): tensor for tensor in tensors}
        return _mapped(lambda each: given.get(id(each), _wrapped(each) if is_second else each), result)
    return _mapped(_wrapped, result) if is_second else result


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for each in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(each)


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Changes the leaves of nested lists, tuples and mappings; torch's own functions for this take most of the time."""
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(change, each) for each in tree])
    if isinstance(tree, Mapping):
        return {name: _mapped(change, each) for name, each in tree.items()}
    return change(tree)


def _values(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, SecondDeviceTensor) else leaf


def _wrapped(leaf: Any) -> Any:
    return SecondDeviceTensor(leaf) if isinstance(leaf, Tensor) else leaf
