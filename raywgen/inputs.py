"""Opens files from unknown sources: only regular files of a bounded size, so that nothing hangs or fills the memory.

Pipes, files that claim to hold far more data than they are long, and paths that lead out of their folder are refused
before they are read.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable, Sequence
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

MAX_JSON_BYTES = 256 << 20
MAX_YAML_BYTES = 16 << 20
_EXPANDED_BYTES = 256 << 20
"""Number of bytes that any file may unpack to, however short it is."""
_EXPANSION = 64
"""Beyond that, the largest ratio of unpacked to packed size; weights rarely shrink to less than a half."""
_YAML_NODES = 100_000
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnusableFileError(OSError, ValueError):
    """A file that is refused; the message says why, and the caller adds the remedy."""


def check_regular(path: str | Path) -> int:
    """Refuses anything but a regular file before it is opened, because opening a pipe may wait for ever.

    Returns:
        The size of the file in bytes.

    Raises:
        UnusableFileError: The path is a folder, pipe, socket or device.
        FileNotFoundError: The path does not exist.
        OSError: The path cannot be examined.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # A NUL in the name.
        raise UnusableFileError(f"{str(path)!r} is no path ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "no regular file")
        raise UnusableFileError(f"{path} is {kind}, not a file")
    return status.st_size


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file; raises as `check_regular` does."""
    check_regular(path)
    # Non-blocking, in case a pipe has replaced the file since the check.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """Reads a whole regular file of at most `max_bytes`; raises as `check_regular` does."""
    size = check_regular(path)
    if size > max_bytes:
        raise UnusableFileError(f"{path} has {size} bytes, and at most {max_bytes} are read of such a file")
    with open_regular(path) as file:
        return file.read(max_bytes)


def parse_json(content: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parses a JSON text.

    Args:
        content: The text.
        make_object: Creates an object from its keys and values; a dict by default.

    Raises:
        ValueError: The text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(content, object_pairs_hook=make_object)
    except RecursionError as error:
        raise UnusableFileError("it is nested too deeply") from error


def read_json(path: str | Path) -> Any:
    """Parses a JSON file; raises as `read_regular` and `parse_json` do."""
    return parse_json(read_regular(path, MAX_JSON_BYTES))


def read_yaml_text(path: str | Path) -> str:
    """Reads a regular YAML file; raises as `read_regular` and `yaml_text` do."""
    return yaml_text(read_regular(path, MAX_YAML_BYTES), path)


def yaml_text(content: bytes, path: str | Path) -> str:
    """Decodes a YAML file, and refuses it if its references would expand to far more nodes than it is long.

    Args:
        content: The content of the file.
        path: The file, for messages.

    Raises:
        yaml.YAMLError: The file is not YAML.
        OSError, UnicodeDecodeError: The file is too deeply nested, or refers to itself.
    """
    text = content.decode()
    if "*" in text or "&" in text:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            count = 0 if root is None else _nodes(root, {}, set())
        except RecursionError as error:
            raise UnusableFileError(f"{path} is nested too deeply") from error
        if count > max(_YAML_NODES, len(text)):
            raise UnusableFileError(f"{path} holds references that stand for {count} values")
    return text


def _nodes(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Counts the nodes below a node; a referenced node counts once per use."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise UnusableFileError("a value refers to itself")
    if id(node) not in known:
        children = [child for pair in node.value for child in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_nodes(child, known, above | {id(node)}) for child in children)
    return known[id(node)]


def check_expansion(num_bytes: int, file_bytes: int, what: str) -> None:
    """Refuses content that would unpack to far more bytes than its file has.

    Args:
        num_bytes: Number of unpacked bytes.
        file_bytes: Number of bytes of the file.
        what: Name of the content for messages.

    Raises:
        UnusableFileError: The content unpacks to more than 256 MiB and more than 64 times the file.
    """
    if num_bytes > max(_EXPANDED_BYTES, _EXPANSION * file_bytes):
        raise UnusableFileError(f"{what} would unpack to {num_bytes} bytes from a file of {file_bytes}")


def check_zip(entries: Sequence[zipfile.ZipInfo], file_bytes: int, source: str) -> None:
    """Refuses a zip file whose entries expand far beyond it or overlap, without reading them.

    Raises:
        UnusableFileError: The entries expand too far, or overlap.
    """
    if sum(entry.compress_size for entry in entries) > file_bytes:
        raise UnusableFileError(f"{source} has entries that claim more bytes than the file has")
    check_expansion(sum(entry.file_size for entry in entries), file_bytes, source)


def inside(name: object) -> str:
    """Returns a relative file name that came as data, after checking that it cannot lead out of its folder.

    Raises:
        UnusableFileError: The name is absolute, an address, or has `..`, a backslash or a NUL.
    """
    is_plain = isinstance(name, str) and "://" not in name and not any(sign in name for sign in "\\\0")
    if not isinstance(name, str) or not is_plain or {"..", ".", ""} & {*name.split("/")}:
        raise UnusableFileError(f"{name!r} is no name of a file below its folder")
    return str(PurePosixPath(name))


def check_stays(root: str | Path, name: str) -> None:
    """Refuses a file that a symbolic link takes out of its folder.

    Raises:
        UnusableFileError: The file lies elsewhere.
    """
    real = os.path.realpath(os.path.join(root, name))
    if not Path(real).is_relative_to(os.path.realpath(root)):
        raise UnusableFileError(f"{name!r} is a link out of its folder, to {real}")
