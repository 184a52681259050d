"""Locks on folders. Local ones are flock-based: the kernel releases them when the holder dies.

Object stores have no locks; see `raywgen.leases` for what stands in their place.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raywgen.leases import HeldError, leased
from raywgen.storage import Storage

LOCK = ".lock"
"""Name of the lock file in a folder that one process at a time may write to."""

_LONGEST_COMMAND = 160
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class InUseError(ValueError):
    """Another process works on the same folder; the message says which one."""


@contextmanager
def only_one(folder: str | Path, storage_type: type[Storage] = Storage) -> Iterator[None]:
    """Holds a folder for this process, and refuses it where another one holds it.

    The folder is created if it is missing. One of an object store is held by a lease.

    Args:
        folder: A local path or a URI.
        storage_type: The class whose errors an object store raises.

    Raises:
        InUseError: Another process holds the folder; the message names its host, process id, command and start.
        OSError: The folder cannot be created or written to.
        StorageError: The same, where it is a URI.
    """
    storage = storage_type.at(folder)
    if not storage.is_local:
        with _leased(storage):
            yield
        return
    with _held(Path(storage.root) / LOCK, folder, timeout=0) as descriptor:
        _write(descriptor, json.dumps(_this_process()))
        try:
            yield
        finally:
            _write(descriptor, "")


@contextmanager
def waiting(path: str | Path) -> Iterator[None]:
    """Waits until nobody else holds the lock file, a local path or a URI, and holds it."""
    storage, name = Storage.around(path)
    if storage.is_local:
        with _held(Path(storage.path(name)), path, timeout=-1):
            yield
        return
    with ExitStack() as stack:
        while True:
            with suppress(HeldError):
                stack.enter_context(leased(storage, name, _this_process(), quiet=True))
                break
        yield


@contextmanager
def _leased(storage: Storage) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(leased(storage, LOCK, _this_process()))
        except HeldError as error:
            raise _in_use(storage.name, _described(error.holder)) from error
        yield


@contextmanager
def _held(path: Path, name: object, timeout: float) -> Iterator[int | None]:
    """Holds a lock file and yields its descriptor, or None, with a warning, if the file system has no locks."""
    descriptors: list[int] = []
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False, on_acquired=descriptors.append)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise _in_use(name, _holder(path)) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            reason = f"{error.strerror or error}; check the folder and its permissions and run the same command again"
            raise OSError(error.errno, reason, str(path.parent)) from error
        warnings.warn(
            f"the file system of {name} does not support locks ({error.strerror}); let only one process work there",
            stacklevel=4,
        )
    try:
        yield descriptors[-1] if descriptors else None
    finally:
        lock.release()


def _in_use(name: object, holder: str) -> InUseError:
    return InUseError(f"{name} is in use: {holder} works on it; wait until it has ended, or give another out")


def _this_process() -> dict[str, str | int]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
    shown = command if len(command) <= _LONGEST_COMMAND else f"{command[:_LONGEST_COMMAND]}..."
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "command": shown, "since": since}


def _holder(path: Path) -> str:
    """Describes the holder, which may have taken the lock a moment ago and not have written who it is yet."""
    try:
        return _described(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return "another process"


def _described(holder: Any) -> str:
    try:
        return f"`{holder['command']}` (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (KeyError, TypeError):
        return "another process"


def _write(descriptor: int | None, text: str) -> None:
    # The text serves a message only, so a full disk is no reason to stop.
    if descriptor is not None:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
