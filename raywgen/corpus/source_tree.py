"""Files below a folder, local or remote, listed once."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from raywgen.corpus.errors import CorpusError
from raywgen.corpus.storage import Storage, absolute

MAGIC = "*?["


class SourceTree:
    """A folder as one listing; paths are relative to it.

    Args:
        location: Local path or URI.

    Raises:
        CorpusError: It cannot be listed.
    """

    def __init__(self, location: str) -> None:
        self._storage = Storage.at(location)
        self._location = location
        self.sizes: dict[PurePosixPath, int] = {}
        self._children: dict[PurePosixPath, set[PurePosixPath]] = {}
        try:
            entries = self._storage.filesystem.get_file_info(
                fs.FileSelector(self._storage.root, recursive=True, allow_not_found=True)
            )
        except OSError as error:
            raise CorpusError(f"{location} cannot be listed ({error}); check the path and its permissions") from error
        for entry in entries:
            path = PurePosixPath(entry.path[len(self._storage.root) :].lstrip("/"))
            if entry.is_file:
                self.sizes[path] = entry.size
            while path.name and path not in self._children.setdefault(path.parent, set()):
                self._children[path.parent].add(path)
                path = path.parent

    def files(self, folder: PurePosixPath) -> list[PurePosixPath]:
        """In a folder itself, sorted."""
        return sorted(child for child in self._children.get(folder, ()) if child in self.sizes)

    def folders(self, folder: PurePosixPath) -> list[PurePosixPath]:
        """In a folder itself, sorted, without hidden ones."""
        inside = self._children.get(folder, ())
        return sorted(child for child in inside if child not in self.sizes and not child.name.startswith("."))

    def matches(self, pattern: str) -> list[PurePosixPath]:
        """Files that a shell pattern relative to the folder names, sorted; `**` means any folders."""
        regex = re.compile(glob_regex(pattern))
        return sorted(path for path in self.sizes if regex.fullmatch(str(path)))

    def full(self, path: PurePosixPath) -> str:
        """What opens a file from anywhere."""
        base, mark, query = self._location.partition("?") if "://" in self._location else (self._location, "", "")
        return absolute(f"{base.rstrip('/')}/{path}{mark}{query}")

    def read_text(self, path: PurePosixPath) -> str:
        """A small file; nothing where there is none."""
        return self._storage.read(str(path)).decode(errors="replace") if path in self.sizes else ""

    def read_json(self, path: PurePosixPath) -> dict[str, Any]:
        """A small JSON object; an empty one where there is none."""
        try:
            content = json.loads(self.read_text(path) or "{}")
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


def glob_regex(pattern: str) -> str:
    """A regular expression for a shell pattern in which `*` stays within a folder and `**` does not."""
    parts = re.findall(r"\*\*/?|\*|\?|\[[^\]]+\]|.", pattern, re.DOTALL)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        special.get(part) or (part.replace("[!", "[^", 1) if len(part) > 1 else re.escape(part)) for part in parts
    )


def until_magic(source: str) -> tuple[str, str]:
    """The folder before the first part with a pattern, and the rest."""
    parts = source.split("/")
    first = next(index for index, part in enumerate(parts) if any(sign in part for sign in MAGIC))
    return "/".join(parts[:first]), "/".join(parts[first:])


@contextmanager
def local_file(file: str) -> Iterator[str]:
    """A local path to a file; a remote one is fetched and removed afterwards.

    Raises:
        CorpusError: It cannot be fetched.
    """
    if "://" not in file:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.at(file)
        path = Path(folder) / Path(storage.root).name
        try:
            fs.copy_files(
                storage.root,
                str(path),
                source_filesystem=storage.filesystem,
                destination_filesystem=fs.LocalFileSystem(),
            )
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"{file} cannot be fetched ({error}); run the same command again") from error
        yield str(path)
