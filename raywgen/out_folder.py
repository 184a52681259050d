"""Checks the `out` of a command before anything runs: a folder that was meant, at a place that can be written to."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from raywgen.storage import Storage, StorageError

SCHEMES = ("s3", "gs", "hdfs", "file")
"""Schemes of the URIs that files are written to."""
_MOST_SECONDS = 60.0
_LEAST_ROOM = 1 << 20
"""Bytes that the smallest command writes: settings, a journal, a log and a page."""
_LIKE_A_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/")


class OutError(StorageError):
    """An `out` that nothing can or should be written to; the message names the remedy."""


def checked_out(out: str | Path, example: str) -> str:
    """Returns the folder of a command's results, with the plain path in place of a `file://` URI.

    An object store is written to and cleaned up once, so that what it refuses is said before anything runs.

    Args:
        out: A local path or a URI.
        example: A folder for messages.

    Raises:
        OutError: It is empty, the current folder, `/`, a home folder or a file, its scheme is unknown, or the object
            store cannot be reached or refuses to be written to.
    """
    text = str(out)
    if not text.strip():
        raise OutError(f"out is empty; name a folder, such as out={example}")
    found = _LIKE_A_URI.match(text)
    if found is None:
        _check_path(text, Path(text), example)
        return text
    if found["scheme"] not in SCHEMES or "://" not in text:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise OutError(f"out={text} is no path, and no URI of those that can be written to: {known}")
    storage = _opened(text)
    if storage.is_local:
        _check_path(text, Path(storage.root or "/"), example)
        return storage.root
    if not storage.root:
        raise OutError(f"out={text} names no bucket or server; give a URI such as s3://bucket/{example}")
    _try_to_write(storage)
    return text


def check_room(out: str, num_bytes: int, provided: str = "") -> None:
    """Refuses a folder whose disk has no room for what it is to hold; object stores have room for anything.

    What lies in the folder already counts as part of that, as a command goes on where it stopped, or replaces files.

    Args:
        out: A local folder, which need not exist yet, or a URI.
        num_bytes: Bytes that it is to hold, at least.
        provided: A clause that says what these bytes rest on, for the message.

    Raises:
        OutError: There is no room for them.
    """
    if not has_room(out, num_bytes):
        raise OutError(
            f"out={out} is to hold at least {_mib(num_bytes)}{f' {provided}' if provided else ''}, and its disk has "
            f"{_mib(_free(out))} left; free some disk space, or name a folder on another disk"
        )


def has_room(out: str, num_bytes: int) -> bool:
    """Whether there is room for what a folder is to hold, see `check_room`."""
    if "://" in out:
        return True
    return num_bytes - sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file()) <= _free(out)


def _free(out: str) -> int:
    return shutil.disk_usage(_existing(Path(out))).free


def local_out(out: str | Path, example: str, what: str, key: str = "out") -> str:
    """Returns the folder of a command's results that cannot be a URI.

    Args:
        out: A local path.
        example: A folder for messages.
        what: The part of the program that writes it, for messages.
        key: The setting that names it, for messages.

    Raises:
        OutError: It is empty, a URI, the current folder, `/`, a home folder or a file.
    """
    text = _local(str(out), example, what, key)
    _check_path(text, Path(text), example, key)
    return text


def local_file(out: str | Path, example: str, what: str) -> str:
    """Returns the file of a command's results, which cannot be a URI; see `local_out`.

    Raises:
        OutError: It is empty, a URI or a folder, or its disk is full.
    """
    text = _local(str(out), example, what, "out")
    if Path(text).is_dir():
        raise OutError(f"out={text} is a folder; name a file, such as out={example}")
    _check_tilde(text, "out")
    _check_disk(text, Path(text), "out")
    return text


def local_path(out: str | Path, example: str, what: str) -> str:
    """Returns the local path of a command's results before anything tells if it is a file or a folder.

    Raises:
        OutError: It is empty, a URI, the current folder, `/` or a home folder, or its disk is full.
    """
    text = _local(str(out), example, what, "out")
    _check_place(text, Path(text), example, "out")
    _check_disk(text, Path(text), "out")
    return text


def _local(text: str, example: str, what: str, key: str) -> str:
    if not text.strip():
        raise OutError(f"{key} is empty; name a path, such as {key}={example}")
    if _LIKE_A_URI.match(text):
        raise OutError(
            f"{key}={text} is a URI, and {what} writes to a local path only; give one, such as {key}={example}"
        )
    return text


def _check_path(text: str, path: Path, example: str, key: str = "out") -> None:
    _check_place(text, path, example, key)
    if path.is_file():
        raise OutError(f"{key}={text} is a file; name a folder, such as {key}={example}")
    above = _existing(path)
    if not above.is_dir():
        raise OutError(f"{key}={text} would lie in {above}, which is a file; name a folder, such as {key}={example}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutError(f"{key}={text} cannot be written: {above} does not allow it; name another folder")
    _check_disk(text, path, key)


def _check_disk(text: str, path: Path, key: str) -> None:
    if shutil.disk_usage(_existing(path)).free < _LEAST_ROOM:
        raise OutError(
            f"{key}={text} cannot be written: its disk is full; free some disk space, or name another folder"
        )


def _existing(path: Path) -> Path:
    """Returns the path itself, or the first folder above it that is there."""
    return next((each for each in (path, *path.absolute().parents) if each.exists()), path)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _check_place(text: str, path: Path, example: str, key: str) -> None:
    places = {
        "the current folder": _place(Path.cwd),
        "the root of the file system": Path("/"),
        "a home folder": _place(Path.home),
    }
    for name, place in places.items():
        if place is not None and path.resolve() == place.resolve():
            raise OutError(f"{key}={text} is {name}; name a folder of its own, such as {key}={example}")
    _check_tilde(text, key)


def _check_tilde(text: str, key: str) -> None:
    if text.startswith("~"):
        raise OutError(f"{key}={text} begins with ~, which only a shell replaces; give the whole path")


def _place(find: Callable[[], Path]) -> Path | None:
    try:
        return find()
    except (RuntimeError, FileNotFoundError):  # The user has no home; the current folder was deleted meanwhile.
        return None


def _opened(text: str) -> Storage:
    try:
        return Storage.at(text)
    except StorageError as error:
        raise OutError(f"out={error}") from error


def _try_to_write(storage: Storage) -> None:
    failures: list[Exception] = []

    def write() -> None:
        name = f".writable-{uuid4().hex}"
        try:
            storage.write(name, b"")
            storage.delete(name)
        except (ValueError, OSError) as error:  # Errors of Arrow are among them.
            failures.append(error)

    # Clients of object stores try again for up to many minutes, also where they find no credentials.
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(_MOST_SECONDS)
    if thread.is_alive():
        failures.append(TimeoutError(f"timed out after {_MOST_SECONDS:.0f} s"))
    if failures:
        raise OutError(f"out={storage.name} cannot be written to: {_reason(failures[0])}") from failures[0]


def _reason(error: Exception) -> str:
    """Returns the cause and the remedy in one line."""
    text = " ".join(str(error.__cause__ or error).split())
    for pattern, remedy in _REMEDIES.items():
        if re.search(pattern, text, re.IGNORECASE):
            return f"{remedy} ({text})"
    return f"{text}; check the URI and the credentials"


_REMEDIES = {
    r"bucket .* not found|NO_SUCH_BUCKET": "there is no such bucket; create it, or correct the name",
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|HTTP status 40[13]|credential|unauthorized|forbidden": (
        "the credentials are missing or wrong, or do not allow it; set those of the store, such as AWS_ACCESS_KEY_ID "
        "and AWS_SECRET_ACCESS_KEY"
    ),
    r"NETWORK_CONNECTION|could not connect|timed? ?out|resolve": (
        "the store does not answer; check the network, the credentials, and AWS_ENDPOINT_URL for a store of your own"
    ),
}
