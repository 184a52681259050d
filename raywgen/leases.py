"""Leases on folders of object stores, which have no locks: an object names the holder, who rewrites it again and again.

No clock is compared with another. Whoever finds the object watches it: if it changes, its holder lives; if it does not
change for `STALE_SECONDS`, its holder is gone, and the lease is taken over. A holder of the same machine whose process
has ended is known to be gone at once.

An object store without conditional writes cannot decide between two processes that begin within the same moment. Each
writes its name, waits for `SETTLE_SECONDS`, and gives way if the other's name stands there. A holder that could not
write for longer than `STALE_SECONDS`, because it was suspended or cut off, may find the folder taken; it is then
interrupted as by Ctrl-C. If it writes once more before it looks, it takes the folder back, and the other one stops.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raywgen.storage import NoSuchFileError, Storage, StorageError

BEAT_SECONDS = 10.0
"""Seconds between two signs of life of a holder."""
STALE_SECONDS = 60.0
"""Seconds without a sign of life after which a lease is taken over."""
SETTLE_SECONDS = 0.5
_LOOK_SECONDS = 2.0


class HeldError(Exception):
    """Another process holds the lease.

    Attributes:
        holder: What the lease says about it.
    """

    def __init__(self, holder: Mapping[str, Any]) -> None:
        super().__init__(str(holder))
        self.holder = holder


@contextmanager
def leased(storage: Storage, name: str, facts: Mapping[str, Any], *, quiet: bool = False) -> Iterator[None]:
    """Holds the lease of a folder.

    Args:
        storage: The folder.
        name: Name of the object.
        facts: What to tell others about this process.
        quiet: Say nothing while another process' lease is watched.

    Raises:
        HeldError: Another process holds it.
        StorageError: The folder cannot be read or written.
    """
    lease = _Lease(storage, name, {**facts, **_identity(), "token": uuid.uuid4().hex})
    lease.take(quiet)
    thread = threading.Thread(target=lease.keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        lease.over.set()
        thread.join()
        lease.release()


class _Lease:
    def __init__(self, storage: Storage, name: str, content: dict[str, Any]) -> None:
        self._storage, self._name, self._content = storage, name, content
        self._beat = 0
        self.over = threading.Event()

    def take(self, quiet: bool) -> None:
        """Waits until the lease is free or known to be taken; raises as `leased` does."""
        first = self._read()
        if first and not _has_ended(first):
            if not quiet:
                print(
                    f"{self._storage.name} was left in use by {first.get('command', 'another process')}; watching for "
                    f"up to {STALE_SECONDS:.0f} s whether it still is",
                    file=sys.stderr,
                    flush=True,
                )
            until = time.monotonic() + STALE_SECONDS
            while time.monotonic() < until:
                time.sleep(min(_LOOK_SECONDS, STALE_SECONDS / 10))
                now = self._read()
                if now is None:
                    break
                if now != first:
                    raise HeldError(now)
        self._write()
        time.sleep(SETTLE_SECONDS)
        if not self._is_ours(found := self._read()):
            raise HeldError(found or {})

    def keep(self) -> None:
        """Gives signs of life until the lease is over or lost."""
        while not self.over.wait(BEAT_SECONDS):
            try:
                found = self._read()
                if self._is_ours(found):
                    self._write()
                    continue
            except StorageError:  # The store may be back at the next beat.
                continue
            by = "nobody" if found is None else found.get("command", "another process")
            warnings.warn(
                f"{self._storage.name} is no longer held by this process but by {by}, as it gave no sign of life for "
                f"{STALE_SECONDS:.0f} s; it stops here",
                stacklevel=2,
            )
            main = threading.main_thread().ident
            assert main is not None, "the main thread runs"
            # Shells let commands in the background ignore Ctrl-C.
            is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.pthread_kill(main, signal.SIGTERM if is_ignored else signal.SIGINT)
            return

    def release(self) -> None:
        """Deletes the object if it is still ours; without an answer of the store it is left, and becomes stale."""
        with suppress(StorageError, OSError):
            if self._is_ours(self._read()):
                self._storage.delete(self._name)

    def _is_ours(self, found: Mapping[str, Any] | None) -> bool:
        return found is not None and found.get("token") == self._content["token"]

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._storage.read(self._name))
        except NoSuchFileError:
            return None
        except ValueError as error:
            if isinstance(error, StorageError):
                raise
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        self._beat += 1
        self._storage.write(self._name, json.dumps(self._content | {"beat": self._beat}).encode())


def _identity() -> dict[str, str]:
    """Returns what tells this process from all others of this machine, also from later ones of the same number."""
    with suppress(OSError):
        return {"machine": _machine(), "started": _started(os.getpid())}
    return {}


def _machine() -> str:
    """Returns the id of this start of the machine and of its process numbers, which containers have of their own."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _has_ended(holder: Mapping[str, Any]) -> bool:
    """Whether a holder is a process of this machine that has ended."""
    try:
        if holder["machine"] != _machine():
            return False
        return _started(int(holder["pid"])) != holder["started"]
    except FileNotFoundError:
        return Path("/proc/self").exists()
    except (OSError, KeyError, ValueError, TypeError):
        return False
