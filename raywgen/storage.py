"""Reads and writes files, local or remote, through `pyarrow.fs`; they are written as a whole or not at all."""

from __future__ import annotations

import builtins
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import pyarrow as pa
from pyarrow import fs

from raywgen.files import in_one_step, sync
from raywgen.inputs import UnusableFileError, check_regular, open_regular, read_regular
from raywgen.locations import absolute, as_uri, location_parts, with_settings

_BLOCK_BYTES = 1 << 22


class StorageError(ValueError):
    """A folder or file that cannot be reached, read or written; the message names it and the remedy."""


class NoSuchFileError(StorageError):
    """A file that is not there."""


class UnreadableFileError(StorageError):
    """A file that is there and cannot be opened."""


def read_file(location: str | Path, max_bytes: int) -> bytes:
    """Reads a whole regular file of at most `max_bytes` at a local path or a URI.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read, or is too large.
    """
    text = str(location)
    if "://" not in text:
        return read_regular(text, max_bytes)
    try:
        storage, name = Storage.around(text)
        size = storage.size(name)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)
        if size > max_bytes:
            raise UnusableFileError(f"{text} has {size} bytes, and at most {max_bytes} are read of such a file")
        return storage.read(name)
    except StorageError as error:
        raise UnusableFileError(str(error)) from error


@dataclass(frozen=True)
class Storage:
    """A folder on a file system.

    Attributes:
        filesystem: The file system.
        root: Path of the folder on the file system.
        name: Location as the user gave it, for messages.

    A subclass may raise errors of its own and name another remedy for files that are missing or damaged.
    """

    failure: ClassVar[type[StorageError]] = StorageError
    missing: ClassVar[type[NoSuchFileError]] = NoSuchFileError
    unreadable: ClassVar[type[UnreadableFileError]] = UnreadableFileError
    restore: ClassVar[str] = "restore it, or delete what belongs to it and run the command that wrote it again"

    filesystem: fs.FileSystem
    root: str
    name: str

    @classmethod
    def at(cls, location: str | Path) -> Self:
        """Opens a local path or a URI (`s3://`, `gs://`, `hdfs://`).

        Raises:
            StorageError: The URI is of an unknown kind or cannot be reached.
        """
        text = str(location)
        try:
            if "://" in text:
                filesystem, root = fs.FileSystem.from_uri(with_settings(as_uri(text)))
            else:
                filesystem, root = fs.LocalFileSystem(), absolute(text)
        except (pa.ArrowException, OSError) as error:
            # Without Java, Arrow lists all places where it might be.
            raise cls.failure(
                f"{text}: {str(error).splitlines()[0]}; give a local path or a URI such as s3://bucket/folder (a ? in "
                "a key is written %3F)"
            ) from error
        return cls(filesystem, root.rstrip("/"), text)

    @classmethod
    def around(cls, location: str | Path) -> tuple[Self, str]:
        """Opens the folder of a file, and returns it with the file's name; raises as `at` does."""
        base, mark, query = location_parts(location)
        folder, slash, name = base.rpartition("/")
        return cls.at(f"{folder or slash}{mark}{query}"), name

    def path(self, relative: str) -> str:
        """Returns the full path of a file in the folder."""
        return f"{self.root}/{relative}"

    @property
    def is_local(self) -> bool:
        """Whether files can be memory-mapped."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def size(self, relative: str) -> int | None:
        """Returns the number of bytes of a file, or None if it does not exist."""
        info = self._info(self.path(relative))
        return info.size if info.type == fs.FileType.File else None

    def modified(self, relative: str) -> float | None:
        """Returns when a file was last written, in seconds since 1970, or None if it does not exist."""
        info = self._info(self.path(relative))
        return None if info.mtime_ns is None or info.type != fs.FileType.File else info.mtime_ns / 1e9

    def version(self, relative: str) -> object:
        """Returns a value that changes when a local file is replaced or written to."""
        if not self.is_local:
            return None
        try:
            found = os.stat(self.path(relative))
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def open(self, relative: str) -> pa.NativeFile:
        """Opens a file for random access; a local one is memory-mapped.

        Raises:
            NoSuchFileError: The file is missing.
            UnreadableFileError: The file cannot be opened.
        """
        try:
            if self.is_local:
                check_regular(self.path(relative))
                return pa.memory_map(self.path(relative))
            return self.filesystem.open_input_file(self.path(relative))
        except FileNotFoundError as error:
            raise self.missing(f"{self.name}/{relative} is missing; {self.restore}") from error
        except OSError as error:
            raise self.unreadable(f"{self.name}/{relative} cannot be opened ({error}); {self.restore}") from error

    def read(self, relative: str) -> bytes:
        """Reads a whole small file."""
        with self.open(relative) as source:
            return source.read()

    def write(self, relative: str, content: pa.Buffer | bytes) -> str:
        """Writes a file in one step and returns its SHA-256; a reader sees all of it or none.

        Raises:
            StorageError: The disk is full or the folder cannot be written; an earlier file stays.
        """
        self.write_all({relative: content})
        return hashlib.sha256(content).hexdigest()

    def write_stream(self, relative: str, write: Callable[[pa.NativeFile], None]) -> tuple[str, int]:
        """Writes a large file in one step without holding it in memory; returns its SHA-256 and its bytes.

        Args:
            relative: Path of the file in the folder.
            write: Called with an open sink.

        Raises:
            StorageError: The disk is full or the folder cannot be written; an earlier file stays.
        """
        partial = self._write_partial(relative, write)
        if partial != self.path(relative):
            self._rename(partial, relative)
        size = self.size(relative)
        assert size is not None, "it was written just now"
        return self.sha256(relative), size

    @contextmanager
    def open_output(self, relative: str) -> Iterator[pa.NativeFile]:
        """Yields a sink for a file that is written piece by piece, and gets its name when all of it is there.

        Raises:
            StorageError: The disk is full or the folder cannot be written; an earlier local file stays.
        """
        with self._partial(relative) as (sink, partial):
            yield sink
        if partial != self.path(relative):
            self._rename(partial, relative)

    @contextmanager
    def local_file(self, relative: str) -> Iterator[Path]:
        """Yields a local path to write a file to: its own, or one from which it is copied at the end of the block.

        Raises:
            StorageError: The folder cannot be written.
        """
        if self.is_local:
            yield Path(self.path(relative))
            return
        with TemporaryDirectory(prefix="raywgen-") as temporary:
            path = Path(temporary) / "file"
            yield path
            self.upload(path, relative)

    def upload(self, local: str | Path, relative: str, last: str = "") -> None:
        """Copies a local file or folder, with all that is below it, to a place in this folder, file by file.

        Args:
            local: The file or folder.
            relative: The place.
            last: Name of the file of a folder that is copied after all others, as it marks them as complete.

        Raises:
            StorageError: The disk is full or the folder cannot be written.
        """
        root = Path(local)
        paths = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
        for path in sorted(paths, key=lambda path: path == root / last):
            target = f"{relative}/{path.relative_to(root)}".strip("/") if root.is_dir() else relative
            with self.open_output(target) as sink, open_regular(path) as source:
                shutil.copyfileobj(source, sink, _BLOCK_BYTES)

    def download(self, relative: str, local: str | Path) -> None:
        """Copies a file or folder, with all that is below it, to a local path; a file gets its name when it is whole.

        Raises:
            NoSuchFileError: There is no such file or folder.
            OSError: The disk is full.
        """
        if self.size(relative) is not None:
            self._download_file(relative, Path(local))
            return
        names = self.walk(relative)
        if not names and not self.exists(relative):
            raise self.missing(f"{self.name}/{relative} is missing; {self.restore}")
        for name in names:
            self._download_file(name, Path(local) / name.removeprefix(relative).lstrip("/"))

    def _download_file(self, relative: str, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        with in_one_step(local) as partial, self.open(relative) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, _BLOCK_BYTES)

    def move(self, relative: str, target: str) -> None:
        """Renames a file; an object store copies it and deletes the old name.

        Raises:
            StorageError: It cannot be renamed.
        """
        self._rename(self.path(relative), target)

    def delete(self, relative: str) -> None:
        """Removes a file or folder if it exists."""
        with suppress(FileNotFoundError):
            if self._info(self.path(relative)).type == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path(relative))
            else:
                self.filesystem.delete_file(self.path(relative))

    def exists(self, relative: str = "") -> bool:
        """Whether there is a file or folder of that name; without one, whether the folder itself is there."""
        return self._info(self._full(relative)).type != fs.FileType.NotFound

    def walk(self, relative: str = "") -> builtins.list[str]:
        """Returns the paths, from the root, of all files below a folder, sorted; empty if there is no folder."""
        selector = fs.FileSelector(self._full(relative), recursive=True, allow_not_found=True)
        found = self._info(selector)
        return sorted(info.path[len(self.root) :].removeprefix("/") for info in found if info.is_file)

    def list(self, relative: str) -> builtins.list[str]:
        """Returns the names of the files in a folder, sorted; empty if there is no folder."""
        selector = fs.FileSelector(self.path(relative), allow_not_found=True)
        return sorted(info.base_name for info in self._info(selector) if info.is_file)

    def sizes(self, relative: str) -> dict[str, int]:
        """Returns the number of bytes of each file in a folder by its name, with few requests; empty without it."""
        selector = fs.FileSelector(self.path(relative), allow_not_found=True)
        return {info.base_name: info.size for info in self._info(selector) if info.is_file}

    def write_all(self, contents: Mapping[str, pa.Buffer | bytes]) -> None:
        """Writes several files; all are written in full before the first of them gets its name, in order.

        Raises:
            StorageError: The disk is full or the folder cannot be written; an earlier file stays.
        """
        partials: dict[str, str] = {}
        try:
            for relative, content in contents.items():
                partials[relative] = self._write_partial(relative, lambda sink, content=content: sink.write(content))
            for relative, partial in partials.items():
                if partial != self.path(relative):
                    self._rename(partial, relative)
        except BaseException:
            for relative, partial in partials.items():
                if partial != self.path(relative):
                    with suppress(OSError):
                        self.filesystem.delete_file(partial)
            raise

    def _write_partial(self, relative: str, write: Callable[[pa.NativeFile], object]) -> str:
        with self._partial(relative) as (sink, partial):
            write(sink)
        return partial

    @contextmanager
    def _partial(self, relative: str) -> Iterator[tuple[pa.NativeFile, str]]:
        """Yields a sink and the path that it writes to, which is removed after an error."""
        target = self.path(relative)
        # A remote file appears when its upload completes; a local one would be visible half-written.
        partial = f"{target}.{os.getpid()}.partial" if self.is_local else target
        try:
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(partial) as sink:
                yield sink, partial
            if self.is_local:
                sync(partial)
        except BaseException as error:  # Ctrl-C must not leave anything behind either.
            with suppress(OSError):
                self.filesystem.delete_file(partial)
            if isinstance(error, OSError):
                raise self._write_error(relative, error) from error
            raise

    def _rename(self, path: str, relative: str) -> None:
        try:
            self.filesystem.move(path, self.path(relative))
        except OSError as error:
            raise self._write_error(relative, error) from error

    def _info(self, what: Any, tries: int = 10) -> Any:
        """Asks the file system about a path or a selection of paths."""
        try:
            return self.filesystem.get_file_info(what)
        except OSError as error:
            if self.is_local:
                # A folder may appear or vanish while Arrow looks at it, which it does not expect.
                if isinstance(error, FileNotFoundError) and tries > 1:
                    return self._info(what, tries - 1)
                raise
            reason = " ".join(str(error).split())
            raise self.failure(
                f"{self.name} cannot be read ({reason}); check the URI, the credentials and the network"
            ) from error

    def _full(self, relative: str) -> str:
        return self.path(relative) if relative else self.root

    def _write_error(self, relative: str, error: OSError) -> StorageError:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        remedy = "free some disk space" if full else "check the folder and its permissions"
        return self.failure(f"cannot write {self.name}/{relative}: {error}; {remedy} and run the same command again")

    def sha256(self, relative: str) -> str:
        """Returns the SHA-256 digest of a file, read in blocks."""
        digest = hashlib.sha256()
        with self.open(relative) as source:
            while block := source.read_buffer(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()
