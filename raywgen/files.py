"""Writes files in one step: a reader sees the old file or the new one, also after a kill or on a full disk.

The content is flushed to the disk before the file gets its name, so that a power failure cannot leave an empty file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DISK_FULL = ("No space left", "File too large", "Disk quota exceeded")
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF)


@contextmanager
def in_one_step(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which is renamed to it at the end; after an error it is removed."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync(path: str | Path) -> None:
    """Flushes a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: str | Path) -> None:
    """Flushes the names in a folder to the disk, if the file system supports that for folders."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8 in one step.

    Raises:
        OSError: The disk is full or the folder cannot be written; an earlier file stays.
    """
    try:
        with in_one_step(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = f"{error.strerror or error}; {remedy(error)} and run the same command again"
        raise OSError(error.errno, reason, str(path)) from error


def remedy(error: Exception) -> str:
    """Returns the remedy for a file that could not be written."""
    full = any(text in str(error) for text in _DISK_FULL)
    return "free some disk space or raise the quota" if full else "check the folder and its permissions"
