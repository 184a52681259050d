"""The cache folder, which all processes of a user on a machine share; its content can be recomputed."""

from __future__ import annotations

import math
import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

FOLDER = "RAYWGEN_CACHE"
"""The environment variable that names the cache folder."""


def cache_folder() -> Path:
    """Returns the folder that `RAYWGEN_CACHE` names, else `raywgen-UID` in the folder of temporary files.

    The folder need not exist yet.

    Raises:
        OSError: Another user created the folder among the temporary files, and could change its content.
    """
    if named := os.environ.get(FOLDER):
        return Path(named)
    folder = Path(tempfile.gettempdir()) / f"raywgen-{os.getuid()}"
    with suppress(FileNotFoundError):
        status = folder.lstat()
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
            raise PermissionError(f"{folder} is not a folder of your own; name another by {FOLDER}")
    return folder


def load_bytes_array(name: str) -> np.ndarray | None:
    """Maps a cached uint8 array into memory, copy-on-write; returns None if it is missing or damaged."""
    try:
        array = np.load(cache_folder() / name, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == np.uint8 else None


def store_bytes_array(name: str, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Writes uint8 blocks one after another as one `.npy` file, whole or not at all, and maps it.

    Args:
        name: Name of the file in `cache_folder()`.
        shape: Shape of the whole array, in C order.
        blocks: Uint8 arrays that fill it.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, partial = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    try:
        # Plain writes rather than a writable map: a full disk is then an error instead of a bus error.
        with os.fdopen(handle, "wb") as target:
            np.lib.format.write_array_header_1_0(target, {"descr": "|u1", "fortran_order": False, "shape": shape})
            written = sum(target.write(np.ascontiguousarray(block).data) for block in blocks)
        assert written == math.prod(shape), f"blocks hold {written} values, the shape {shape} another number"
        os.replace(partial, folder / name)
    except BaseException:
        os.unlink(partial)
        raise
    return np.load(folder / name, mmap_mode="c", allow_pickle=False)
