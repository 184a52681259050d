"""Attention of one new position of every sequence to a cache of keys and values, on a CPU.

Torch's own attention and compiled sums over products take two to three times as long for a batch: they read the cache
slice by slice, and wait for memory at the beginning of each. `cached_attention.cpp` asks for the next slice while it
works on one. It is built by the C++ compiler that `torch.compile` needs too, for each process anew, which takes less
than half a second.

Here B counts sequences, J heads of keys and values, G queries that share one, and E is the width of a head.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LANES = 16
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_DTYPES = (torch.float32, torch.bfloat16)


def can_attend(head_width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether `write_and_attend` works for a width of heads and a type of the cache: it needs a compiler."""
    if device.type != "cpu" or dtype not in _DTYPES or head_width % (2 * _LANES):
        return False
    return _library(head_width, dtype) is not None


def _write_and_attend(
    query_BJGE: Tensor,
    key_BJE: Tensor,
    value_BJE: Tensor,
    keys_BJTE: Tensor,
    values_BJTE: Tensor,
    position_1: Tensor,
) -> Tensor:
    """Writes a key and a value to the cache, and returns the values `(B, J, G, E)` that queries attend to, float32.

    Args:
        query_BJGE: Queries that are scaled already, float32.
        key_BJE: The keys of a position.
        value_BJE: Its values.
        keys_BJTE: The cache of keys, float32 or bfloat16; slices `(T, E)` without gaps lie equally far apart.
        values_BJTE: The cache of values, as that of keys.
        position_1: The position, which is the last one that is attended to, int64.
    """
    B, J, G, E = query_BJGE.shape
    library = _library(E, keys_BJTE.dtype)
    assert library is not None, "can_attend was not asked"
    stride, position = keys_BJTE.stride(1), int(position_1)
    for part in (keys_BJTE, values_BJTE):
        assert part.stride() == (J * stride, stride, E, 1), f"slices of the cache lie at {part.stride()}"
    keys_BJTE[:, :, position], values_BJTE[:, :, position] = key_BJE, value_BJE
    query_BJGE, out = query_BJGE.contiguous(), torch.empty(B, J, G, E)
    library.attend(
        *(ctypes.c_void_p(part.data_ptr()) for part in (query_BJGE, keys_BJTE, values_BJTE, out)),
        *(ctypes.c_int64(number) for number in (B * J, G, position + 1, stride)),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return out


def _fake(query_BJGE: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(query_BJGE, memory_format=torch.contiguous_format)


@cache
def _library(head_width: int, dtype: torch.dtype) -> Any:
    """Builds the library for a width and a type, and loads it; None where it cannot be built."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "clang++"]
    defined = [f"-DHEAD_WIDTH={head_width}", *(["-DHALF"] if dtype == torch.bfloat16 else [])]
    with tempfile.TemporaryDirectory(prefix="raywgen-build-") as folder:
        source, built = Path(folder) / "cached_attention.cpp", Path(folder) / "cached_attention.so"
        source.write_bytes(files("raywgen.nn").joinpath(source.name).read_bytes())
        try:
            subprocess.run([*compiler, *_FLAGS, *defined, "-o", built, source], check=True, capture_output=True)
            return ctypes.CDLL(str(built))
        except (OSError, subprocess.CalledProcessError):
            return None


# `torch.library.custom_op` says the same in fewer words, and adds 60 microseconds to every call.
_OPERATORS = torch.library.Library("raywgen", "DEF")
_OPERATORS.define(
    "write_and_attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor position) "
    "-> Tensor"
)
_OPERATORS.impl("write_and_attend", _write_and_attend, "CPU")
torch.library.register_fake("raywgen::write_and_attend", _fake, lib=_OPERATORS)
write_and_attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = (
    torch.ops.raywgen.write_and_attend
)
"""The operator; see `_write_and_attend`."""
