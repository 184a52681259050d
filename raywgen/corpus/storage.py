"""Reads and writes files, local or remote, through `pyarrow.fs`; they are written as a whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError, MissingFileError
from raywgen.inputs import check_regular

_BLOCK_BYTES = 1 << 22


def absolute(location: str | Path) -> str:
    """Makes a path absolute, for processes with another working directory; URIs do not change."""
    return str(location) if "://" in str(location) else str(Path(location).absolute())


def as_uri(text: str) -> str:
    """Quotes a URI whose path may hold spaces, accents, brackets or a lone %."""
    base, mark, query = text.partition("?")
    scheme, _, rest = base.partition("://")
    bucket, slash, path = rest.partition("/")
    if re.search(r"%(?![0-9A-Fa-f]{2})", path):
        path = quote(path)
    elif re.search(r"[^\w.~!$&'()*+,;=:@/%-]", path, re.ASCII):
        path = quote(path, safe="/%")
    return f"{scheme}://{bucket}{slash}{path}{mark}{query}"


@dataclass(frozen=True)
class Storage:
    """A folder on a file system.

    Attributes:
        filesystem: The file system.
        root: Path of the folder on the file system.
        name: Location as the user gave it, for messages.
    """

    filesystem: fs.FileSystem
    root: str
    name: str

    @classmethod
    def at(cls, location: str | Path) -> Self:
        """Opens a local path or a URI (`s3://`, `gs://`, `hdfs://`).

        Raises:
            CorpusError: The URI is of an unknown kind or cannot be reached.
        """
        text = str(location)
        try:
            if "://" in text:
                filesystem, root = fs.FileSystem.from_uri(_with_endpoint(as_uri(text)))
            else:
                filesystem, root = fs.LocalFileSystem(), absolute(text)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(
                f"{text}: {error}; give a local path or a URI such as s3://bucket/folder (a ? in a key is written %3F)"
            ) from error
        return cls(filesystem, root.rstrip("/"), text)

    def path(self, relative: str) -> str:
        """Returns the full path of a file in the folder."""
        return f"{self.root}/{relative}"

    @property
    def is_local(self) -> bool:
        """Whether files can be memory-mapped."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def size(self, relative: str) -> int | None:
        """Returns the number of bytes of a file, or None if it does not exist."""
        info = self.filesystem.get_file_info(self.path(relative))
        return info.size if info.type == fs.FileType.File else None

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
            MissingFileError: The file is missing.
        """
        try:
            if self.is_local:
                check_regular(self.path(relative))
                return pa.memory_map(self.path(relative))
            return self.filesystem.open_input_file(self.path(relative))
        except FileNotFoundError as error:
            raise MissingFileError(f"{self.name}/{relative} is missing; {RESTORE}") from error
        except OSError as error:
            raise DamagedFileError(f"{self.name}/{relative} cannot be opened ({error}); {RESTORE}") from error

    def read(self, relative: str) -> bytes:
        """Reads a whole small file."""
        with self.open(relative) as source:
            return source.read()

    def write(self, relative: str, content: pa.Buffer | bytes) -> str:
        """Writes a file in one step and returns its SHA-256; a reader sees all of it or none.

        Raises:
            CorpusError: The disk is full or the folder cannot be written; an earlier file stays.
        """
        self.write_all({relative: content})
        return hashlib.sha256(content).hexdigest()

    def write_stream(self, relative: str, write: Callable[[pa.NativeFile], None]) -> tuple[str, int]:
        """Writes a large file in one step without holding it in memory; returns its SHA-256 and its bytes.

        Args:
            relative: Path of the file in the folder.
            write: Called with an open sink.

        Raises:
            CorpusError: The disk is full or the folder cannot be written; an earlier file stays.
        """
        partial = self._write_partial(relative, write)
        if partial != self.path(relative):
            self._move(partial, relative)
        size = self.size(relative)
        assert size is not None, "it was written just now"
        return self.sha256(relative), size

    def delete(self, relative: str) -> None:
        """Removes a file or folder if it exists."""
        with suppress(FileNotFoundError):
            if self.filesystem.get_file_info(self.path(relative)).type == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path(relative))
            else:
                self.filesystem.delete_file(self.path(relative))

    def list(self, relative: str) -> list[str]:
        """Returns the names of the files in a folder, sorted; empty if there is no folder."""
        selector = fs.FileSelector(self.path(relative), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector) if info.is_file)

    def write_all(self, contents: Mapping[str, pa.Buffer | bytes]) -> None:
        """Writes several files; all are written in full before the first of them gets its name, in order.

        Raises:
            CorpusError: The disk is full or the folder cannot be written; an earlier file stays.
        """
        partials: dict[str, str] = {}
        try:
            for relative, content in contents.items():
                partials[relative] = self._write_partial(relative, lambda sink, content=content: sink.write(content))
            for relative, partial in partials.items():
                if partial != self.path(relative):
                    self._move(partial, relative)
        except BaseException:
            for relative, partial in partials.items():
                if partial != self.path(relative):
                    with suppress(OSError):
                        self.filesystem.delete_file(partial)
            raise

    def _write_partial(self, relative: str, write: Callable[[pa.NativeFile], None]) -> str:
        target = self.path(relative)
        # A remote file appears when its upload completes; a local one would be visible half-written.
        partial = f"{target}.{os.getpid()}.partial" if self.is_local else target
        try:
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(partial) as sink:
                write(sink)
            if self.is_local:
                _sync(partial)
        except BaseException as error:  # Ctrl-C must not leave anything behind either.
            with suppress(OSError):
                self.filesystem.delete_file(partial)
            if isinstance(error, OSError):
                raise self._write_error(relative, error) from error
            raise
        return partial

    def _move(self, partial: str, relative: str) -> None:
        try:
            self.filesystem.move(partial, self.path(relative))
        except OSError as error:
            raise self._write_error(relative, error) from error

    def _write_error(self, relative: str, error: OSError) -> CorpusError:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        remedy = "free some disk space" if full else "check the folder and its permissions"
        return CorpusError(f"cannot write {self.name}/{relative}: {error}; {remedy} and run the same command again")

    def sha256(self, relative: str) -> str:
        """Returns the SHA-256 digest of a file, read in blocks."""
        digest = hashlib.sha256()
        with self.open(relative) as source:
            while block := source.read_buffer(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()


def _with_endpoint(uri: str) -> str:
    """Adds `AWS_ENDPOINT_URL` (MinIO, Ceph, on-premise stores), which other S3 clients obey and Arrow does not."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint or not uri.startswith("s3://") or "endpoint_override=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}endpoint_override={quote(endpoint, safe='')}"


def _sync(path: str) -> None:
    """Flushes a file to the disk: after a power failure a name must not exist without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
