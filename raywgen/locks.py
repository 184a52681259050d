"""Locks on folders. The kernel frees a lock when its holder ends, so that nobody ever waits for the dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

LOCK = ".lock"
"""Name of the lock file in a folder that one process at a time may write to."""

_LONGEST_COMMAND = 160
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class InUseError(ValueError):
    """Another process works on the same folder; the message says which one."""


@contextmanager
def only_one(folder: str | Path) -> Iterator[None]:
    """Holds a folder for this process, and refuses it where another one holds it.

    The folder is made where there is none. A URI of an object store is not locked, as there is nothing to lock.

    Raises:
        InUseError: Another process holds the folder; the message names its host, process id, command and start.
        OSError: The folder cannot be made or written to.
    """
    if "://" in str(folder):
        yield
        return
    with _opened(Path(folder) / LOCK) as file:
        if not _take(file, folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise InUseError(
                f"{folder} is in use: {_holder(file)} works on it; wait until it has ended, or give another out"
            )
        _write(file, json.dumps(_this_process()))
        try:
            yield
        finally:
            _write(file, "")


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Waits until nobody else holds the lock file, and holds it."""
    with _opened(path) as file:
        _take(file, path, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link in a folder of somebody else's could lead to any file, which would be emptied.
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        file = os.fdopen(descriptor, "a+", encoding="utf-8")
    except OSError as error:
        reason = f"{error.strerror or error}; check the folder and its permissions and run the same command again"
        raise OSError(error.errno, reason, str(path.parent)) from error
    with file:
        yield file


def _take(file: IO[str], name: object, how: int) -> bool:
    """Whether the lock is held now; it counts as held, with a warning, where the file system knows no locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warnings.warn(
            f"the file system of {name} knows no locks ({error.strerror}); let one process alone work there",
            stacklevel=4,
        )
    return True


def _this_process() -> dict[str, str | int]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
    shown = command if len(command) <= _LONGEST_COMMAND else f"{command[:_LONGEST_COMMAND]}..."
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "command": shown, "since": since}


def _holder(file: IO[str]) -> str:
    """The holder in words; it may have taken the lock a moment ago and not have said yet who it is."""
    file.seek(0)
    try:
        told = json.loads(file.read())
        return f"`{told['command']}` (process {told['pid']} on {told['host']}, since {told['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _write(file: IO[str], text: str) -> None:
    """Who holds a lock helps a message only, so a full disk is no reason to stop."""
    try:
        file.truncate(0)
        file.write(text)
        file.flush()
    except OSError:
        return
