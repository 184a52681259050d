"""The workers that save and load a checkpoint together, and the folder that all of them must reach."""

from __future__ import annotations

import os
import time
import uuid
from typing import Protocol

from raywgen.config import ConfigError
from raywgen.storage import Storage, StorageError
from raywgen.training.checkpoints.patience import patiently

_LAUNCH = ".launch"
# Network file systems show a new file to other nodes after some seconds.
_SECONDS, _POLL_SECONDS = 60.0, 0.5


class Group(Protocol):
    """The workers of a run, as one of them sees them.

    Attributes:
        rank: Its number.
        num_workers: Number of all workers.
    """

    rank: int
    num_workers: int

    def exchange(self, text: str) -> list[str]:
        """Returns the texts of all workers, by rank; every worker must call it."""
        ...


class Alone:
    """A process that saves and loads by itself."""

    rank, num_workers = 0, 1

    def exchange(self, text: str) -> list[str]:
        """Returns its own text."""
        return [text]


def agree_on_folder(out: str, group: Group, seconds: float = _SECONDS) -> str:
    """Checks that all workers reach one run folder, and returns a name for this launch, the same on all of them.

    Args:
        out: The run folder.
        group: The workers.
        seconds: How long a worker waits to see what the first one has written.

    Raises:
        ConfigError: A worker does not see what the first one writes there; all workers raise it.
    """
    launch = group.exchange(uuid.uuid4().hex)[0]
    if group.num_workers == 1:
        return launch
    storage, reason = Storage.at(out), ""
    if group.rank == 0:
        try:
            patiently(lambda: storage.write(_LAUNCH, launch.encode()))
        except (StorageError, OSError) as error:
            reason = str(error)
    if not any(group.exchange(reason)) and not _is_seen(storage, launch, seconds):
        reason = (
            f"{out}: worker {group.rank} on node {os.uname().nodename} does not see what worker 0 writes there; give "
            "an `out` on a file system that all nodes share, or a URI"
        )
    if reasons := [reason for reason in group.exchange(reason) if reason]:
        raise ConfigError(reasons[0])
    return launch


def _is_seen(storage: Storage, launch: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            if storage.read(_LAUNCH) == launch.encode():
                return True
        except (StorageError, OSError):
            pass  # It may still come.
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
