"""The file in a run folder by which the launching process asks workers on all nodes to stop."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from raywgen.storage import Storage, StorageError

STOP = ".stop"
_POLL_SECONDS, _POLL_SECONDS_OF_STORE = 0.5, 2.0


class StopFile:
    """A request to stop, which holds as soon as the file is there.

    Args:
        out: Run folder, a local path or a URI.
    """

    def __init__(self, out: str | Path) -> None:
        self._storage = Storage.at(out)
        self._looked = 0.0
        self._is_there = False
        self._watch: threading.Thread | None = None

    def asked(self) -> bool:
        """Whether the file is there, or was a moment ago."""
        if self._is_there:
            return True
        if not self._storage.is_local:
            self._start_watch()
        elif time.monotonic() - self._looked > _POLL_SECONDS:
            self._looked = time.monotonic()
            self._is_there = self._storage.exists(STOP)
        return self._is_there

    def awaited(self) -> AbstractContextManager[None]:
        """Marks nothing: no signal comes this way."""
        return nullcontext()

    def ask(self) -> None:
        """Writes the file; an object store that does not answer is asked again by the next call."""
        if not self._is_there:
            with suppress(StorageError):
                self._storage.write(STOP, b"")
                self._is_there = True

    def withdraw(self) -> None:
        """Deletes the file."""
        with suppress(StorageError, OSError):
            self._storage.delete(STOP)
        self._is_there = False

    def _start_watch(self) -> None:
        # A step must not wait for an answer of the store.
        if self._watch is None:
            self._watch = threading.Thread(target=self._keep_watch, daemon=True)
            self._watch.start()

    def _keep_watch(self) -> None:
        while not self._is_there:
            with suppress(StorageError, OSError):
                self._is_there = self._storage.exists(STOP)
            time.sleep(_POLL_SECONDS_OF_STORE)
