"""Lists the files below a folder, local or remote, once."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from raywgen.corpus.aside import PASSED_OVER, REFUSED
from raywgen.corpus.errors import CorpusError, FetchError
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.walk import File, Listing, walk
from raywgen.locations import absolute, as_uri, location_parts
from raywgen.locks import LOCK
from raywgen.weights.kinds import HEAD_BYTES

MAGIC = "*?["
_REQUESTS = 16
_HIDDEN = "is a hidden folder; give it as a source of its own to take its files"


class SourceTree:
    """The listing of a folder; paths are relative to it.

    Args:
        location: Local path or URI.
        pattern: A shell pattern relative to the folder; only folders that can lead to a match are listed.
        only: A file in the folder; no other file is listed.

    Attributes:
        sizes: Number of bytes of each file.
        listed: Each file as it was listed.
        aside: Entries that could not be listed: path, reason, kind.

    Raises:
        CorpusError: The folder cannot be listed.
    """

    def __init__(self, location: str, pattern: str = "**", *, only: str = "") -> None:
        self._storage = CorpusStorage.at(location)
        self._location = as_uri(location) if "://" in location else location
        self._parts = pattern.split("/")
        self._regex = re.compile(glob_regex(pattern))
        try:
            if only:
                listing = self._list_one(only)
            elif self._storage.is_local:
                listing = walk(self._storage.root, self._enters)
            else:
                listing = self._list_remote()
        except OSError as error:
            raise CorpusError(f"{location} cannot be listed ({error}); check the path and its permissions") from error
        if pattern == "**" and not only:
            hidden = (path for path in listing.skipped if path.name.startswith("."))
            listing.aside += [(path, _HIDDEN, PASSED_OVER) for path in hidden]
        # Folders that a command of raywgen has written hold a lock file.
        listing.files = {path: file for path, file in listing.files.items() if path.name != LOCK}
        self.listed = listing.files
        self.aside = listing.aside
        self.sizes = {path: file.size for path, file in listing.files.items()}
        # The keys are strings, because paths are much slower and larger.
        self._files: dict[str, list[PurePosixPath]] = {}
        for path in self.sizes:
            self._files.setdefault(_folder(str(path)), []).append(path)
        self._folders: dict[str, set[str]] = {}
        for folder in self._files:
            while folder and folder not in self._folders.setdefault(_folder(folder), set()):
                self._folders[_folder(folder)].add(folder)
                folder = _folder(folder)
        base, self._mark, self._query = location_parts(self._location)
        self._base = absolute(base).rstrip("/")

    def _list_one(self, name: str) -> Listing:
        path = self._storage.path(name)
        if self._storage.is_local:
            status, real = os.stat(path), os.path.realpath(path)
            return Listing({PurePosixPath(name): File(status.st_size, str(status.st_mtime_ns), real, is_link=False)})
        entry = self._storage.filesystem.get_file_info(path)
        return Listing({PurePosixPath(name): File(entry.size, str(entry.mtime_ns), entry.path, is_link=False)})

    def _list_remote(self) -> Listing:
        listing = Listing()
        is_deep = len(self._parts) > 1 or self._parts == ["**"]
        selector = fs.FileSelector(self._storage.root, recursive=is_deep, allow_not_found=True)
        for entry in self._storage.filesystem.get_file_info(selector):
            name = entry.path[len(self._storage.root) :].removeprefix("/")
            path = PurePosixPath(name)
            if not entry.is_file:
                continue
            if closed := [folder for folder in path.parents if not self._enters(folder)]:
                listing.skipped.add(closed[-1])
                continue
            if str(path) != name or path.is_absolute():
                reason = f"has an empty part or a dot in its key '{entry.path}', which cannot be opened; rename it"
                listing.aside.append((path, reason, REFUSED))
            else:
                listing.files[path] = File(entry.size, str(entry.mtime_ns), entry.path, is_link=False)
        return listing

    def _enters(self, folder: PurePosixPath) -> bool:
        """Whether a folder can hold files that match the pattern; hidden folders must be named."""
        for index, part in enumerate(folder.parts):
            wanted = self._parts[min(index, len(self._parts) - 1)]
            if wanted == "**":
                return not any(inner.startswith(".") for inner in folder.parts[index:])
            is_last = index >= len(self._parts) - 1
            if is_last or not re.fullmatch(glob_regex(wanted), part) or part.startswith(".") > wanted.startswith("."):
                return False
        return True

    def files(self, folder: PurePosixPath) -> list[PurePosixPath]:
        """Returns the files of a folder, sorted, without those of its subfolders."""
        return sorted(self._files.get(_text(folder), ()), key=attrgetter("name"))

    def folders(self, folder: PurePosixPath) -> list[PurePosixPath]:
        """Returns the direct subfolders of a folder, sorted."""
        return [PurePosixPath(child) for child in sorted(self._folders.get(_text(folder), ()))]

    def matches(self) -> list[PurePosixPath]:
        """Returns the files that match the pattern, sorted; `**` means any folders."""
        return sorted(filter(self.names, self.sizes))

    def names(self, path: PurePosixPath) -> bool:
        """Whether a path matches the pattern."""
        return self._regex.fullmatch(str(path)) is not None

    def full(self, path: PurePosixPath) -> str:
        """Returns the absolute path or URI of a file."""
        if "://" in self._base:
            return f"{self._base}/{quote(str(path))}{self._mark}{self._query}"
        return f"{self._base}/{path}" if path.name else self._base or "/"

    def heads(self, paths: list[PurePosixPath]) -> list[bytes | OSError]:
        """Reads the first bytes of files; returns the error of those that cannot be read."""
        with ThreadPoolExecutor(1 if self._storage.is_local else _REQUESTS) as requests:
            return list(requests.map(self._head, paths))

    def _head(self, path: PurePosixPath) -> bytes | OSError:
        try:
            with self.open(path) as file:
                return file.read(HEAD_BYTES)
        except OSError as error:
            return error

    def open(self, path: PurePosixPath) -> pa.NativeFile:
        """Opens a file for random access."""
        return self._storage.filesystem.open_input_file(self._storage.path(str(path)))

    def read_text(self, path: PurePosixPath) -> str:
        """Reads a small file; returns an empty text if it is missing or cannot be read."""
        if not self.sizes.get(path):
            return ""
        try:
            return self._storage.read(str(path)).decode(errors="replace")
        except (CorpusError, OSError):
            return ""

    def read_json(self, path: PurePosixPath) -> dict[str, Any]:
        """Reads a small JSON object; returns an empty one if there is none."""
        try:
            content = json.loads(self.read_text(path) or "{}")
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


def _text(folder: PurePosixPath) -> str:
    return str(folder) if folder.name else ""


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def glob_regex(pattern: str) -> str:
    """Translates a shell pattern, in which `*` stays within a folder and `**` does not, to a regular expression."""
    parts = re.findall(r"\*\*/?|\*|\?|\[[^\]]+\]|.", pattern, re.DOTALL)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        special.get(part) or (part.replace("[!", "[^", 1) if len(part) > 1 else re.escape(part)) for part in parts
    )


def until_magic(source: str) -> tuple[str, str]:
    """Splits a path before the first part with a pattern."""
    parts = source.split("/")
    first = next(index for index, part in enumerate(parts) if any(sign in part for sign in MAGIC))
    return "/".join(parts[:first]), "/".join(parts[first:])


def open_remote(file: str) -> pa.NativeFile:
    """Opens a remote file for random access; raises as `local_file` does."""
    storage = CorpusStorage.at(file)
    try:
        return storage.filesystem.open_input_file(storage.root)
    except (OSError, pa.ArrowException) as error:
        raise _fetch_error(file, error) from error


def _fetch_error(file: str, error: Exception) -> FetchError:
    return FetchError(f"{file} cannot be fetched ({error}); see that it can be read, and build again")


@contextmanager
def local_file(file: str) -> Iterator[str]:
    """Yields a local path to a file; a remote file is fetched, and the copy removed afterwards.

    Raises:
        FetchError: The file cannot be fetched.
    """
    if "://" not in file:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        storage = CorpusStorage.at(file)
        path = Path(folder) / Path(storage.root).name
        try:
            fs.copy_files(
                storage.root,
                str(path),
                source_filesystem=storage.filesystem,
                destination_filesystem=fs.LocalFileSystem(),
            )
        except (OSError, pa.ArrowException) as error:
            raise _fetch_error(file, error) from error
        yield str(path)
