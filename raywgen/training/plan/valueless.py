"""Tensors without values, by which a step of any size is run for its shapes alone."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# The public face of fake tensors, `torch.export` and `torch.compile`, has no way to run plain code on them.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from raywgen.nn.passes import few_passes
from raywgen.weights import chunks

_aten = torch.ops.aten
_TABLES = ("raywgen.weights", "raywgen.nn", "raywgen.generators")
_CacheWrapper = type(functools.lru_cache(lambda: None))


@contextmanager
def valueless() -> Iterator[None]:
    """Lets every tensor that is made within this block have a shape, and neither values nor memory.

    Code whose course depends on values goes on with guesses: a condition holds, a whole number is 0 and any other a
    half, a mask selects all.
    Tables of layouts that the package keeps from call to call are dropped before and after, as they hold tensors.
    """
    block = chunks.BLOCK
    _drop_tables()
    chunks.BLOCK = sys.maxsize  # Tables need no memory here, and thousands of parts would take their time.
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Guesses(), few_passes():
            yield
    finally:
        chunks.BLOCK = block
        _drop_tables()


class _Guesses(TorchDispatchMode):
    """Answers what a tensor without values cannot."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and _is_unknown(args[0]):
            return True if args[0].dtype == torch.bool else 0.5 if args[0].is_floating_point() else 0
        if func is _aten.nonzero.default:
            return args[0].new_zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func is _aten.masked_select.default:
            return args[0].new_zeros(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
        if func is _aten.bincount.default:
            (least,) = args[2:] or (kwargs.get("minlength", 0),)
            return args[0].new_zeros(max(1, least), dtype=torch.int64)
        if func is _aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in _places(index)])
        return func(*args, **kwargs)


def _is_unknown(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Returns an index as numbers of places; in place of a mask, as many as if it selected everything."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [index.new_zeros(index.numel(), dtype=torch.int64) for _ in range(index.dim())]


def _drop_tables() -> None:
    for each in gc.get_objects():
        if type(each) is _CacheWrapper and (each.__module__ or "").startswith(_TABLES):
            each.cache_clear()
