"""Builds modules whose parameters lie elsewhere than in this process' memory, for modules larger than that.

A parameter gets its place as soon as its module has it, so at most one at a time lies in memory. Whatever gives values
to it afterwards, such as a layer above that sets it to zero, gives them to its place.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

_LEAST_BYTES = 1 << 20
"""Smaller parameters stay in memory, as a file takes whole pages."""


def without_values() -> AbstractContextManager[None]:
    """Parameters of modules that are built within this block have shapes and dtypes alone, on the device "meta"."""
    return _placing(lambda parameter: nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))


def on_disk(folder: str | None = None) -> AbstractContextManager[None]:
    """Large parameters of modules that are built within this block are mapped from files.

    The system writes their pages to the disk where memory is short. The files have no name any more, and are gone with
    the parameters.

    Args:
        folder: Folder of the files; that of temporary files by default.
    """

    def place(parameter: nn.Parameter) -> nn.Parameter:
        num, dtype = math.prod(parameter.shape), parameter.dtype
        if num * dtype.itemsize >= _LEAST_BYTES and parameter.device.type == "cpu":
            file, path = tempfile.mkstemp(dir=folder, prefix="raywgen-parameter-")
            os.close(file)
            try:
                mapped = torch.from_file(path, shared=True, size=num, dtype=dtype).view(parameter.shape)
            finally:
                os.unlink(path)
            parameter.data = mapped.copy_(parameter.data)
        return parameter

    return _placing(place)


@contextmanager
def _placing(place: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    register = nn.Module.register_parameter
    placed: set[int] = set()

    def register_placed(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        # A tied parameter has several names, and one place.
        if param is not None and id(param) not in placed:
            found = place(param)
            placed.add(id(found))
            self._parameters[name] = found

    nn.Module.register_parameter = register_placed
    try:
        yield
    finally:
        nn.Module.register_parameter = register
