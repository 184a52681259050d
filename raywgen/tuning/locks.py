"""Locks that go with the process that holds them, so that nobody waits for the dead."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raywgen.config import ConfigError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until nobody else holds the lock; the kernel frees it where the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Refuses where somebody else is at it.

    Raises:
        ConfigError: The lock is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{what} is under way already; wait for it, or give another out") from error
        yield
