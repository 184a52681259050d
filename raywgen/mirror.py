"""Local folders whose files are copied to a folder of an object store, for what can only be written locally.

An object store knows no appending: a file that grows is copied again as a whole, at a bounded rate.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raywgen.storage import Storage, StorageError

LEAST_SECONDS = 5.0
"""Seconds between two rounds of copies; a round that takes long is followed by a longer pause."""
_PAUSE_OVER_ROUND = 20.0
_INCOMPLETE = re.compile(r"\..*|.*\.partial")


class Mirror:
    """Copies the files of a local folder to another place as they change.

    Args:
        folder: The local folder.
        storage: Where the files are copied to.
    """

    def __init__(self, folder: Path, storage: Storage) -> None:
        self.folder, self._storage = folder, storage
        self._copied: dict[str, tuple[int, int]] = {}
        self._wanted, self._over = threading.Event(), threading.Event()
        self._round = threading.Lock()
        self._thread: threading.Thread | None = None

    def fetch(self, *names: str) -> None:
        """Copies files and folders from the other place, as far as they are there.

        Raises:
            StorageError: They cannot be read.
        """
        for name in names:
            if self._storage.exists(name):
                self._storage.download(name, self.folder / name if name else self.folder)
        self._copied |= self._changed()

    def start(self) -> None:
        """Begins to copy in the background; a round that fails is tried again."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def soon(self) -> None:
        """Asks for a round of copies without the usual pause."""
        self._wanted.set()

    def close(self) -> None:
        """Ends the copies in the background, then copies what is left.

        Raises:
            StorageError: It cannot be written.
        """
        if self._thread is not None:
            self._over.set()
            self._wanted.set()
            self._thread.join()
        self.copy()

    def copy(self) -> None:
        """Copies each file that has changed since it was copied.

        Raises:
            StorageError: It cannot be written.
        """
        with self._round:
            for name, version in self._changed().items():
                self._storage.upload(self.folder / name, name)
                self._copied[name] = version

    def _changed(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not _INCOMPLETE.fullmatch(path.name):
                status = path.stat()
                name, version = path.relative_to(self.folder).as_posix(), (status.st_size, status.st_mtime_ns)
                if self._copied.get(name) != version:
                    found[name] = version
        return found

    def _run(self) -> None:
        pause = LEAST_SECONDS
        while not self._over.is_set():
            self._wanted.wait(pause)
            self._wanted.clear()
            begin = time.monotonic()
            with suppress(StorageError, OSError):  # What is left to copy at the end says so if it still fails.
                self.copy()
            pause = max(LEAST_SECONDS, _PAUSE_OVER_ROUND * (time.monotonic() - begin))


@contextmanager
def working_folder(out: str | Path, *names: str) -> Iterator[Path]:
    """Yields a local folder for results: the folder itself, or a copy of one in an object store.

    What is written to the copy is copied back while the block runs and at its end, also after an error.

    Args:
        out: A local path or a URI.
        names: Files and folders that the block reads or goes on with; an empty one stands for everything.

    Raises:
        StorageError: The object store cannot be read or written.
    """
    storage = Storage.at(out)
    if storage.is_local:
        yield Path(storage.root)
        return
    with tempfile.TemporaryDirectory(prefix="raywgen-") as temporary:
        mirror = Mirror(Path(temporary), storage)
        mirror.fetch(*names)
        mirror.start()
        try:
            yield mirror.folder
        finally:
            mirror.close()
