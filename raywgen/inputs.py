"""Opens what others wrote: regular files alone, within bounds of size, so that nothing hangs or fills the memory.

A file that claims to hold much more than it is long, a pipe, and a path that leads out of its folder are refused
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
"""What anything may unpack to, however short it is."""
_EXPANSION = 64
"""Beyond that, how many times as long as the file; weights shrink to a half at best, and constant ones are rare."""
_YAML_NODES = 100_000
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnusableFileError(OSError, ValueError):
    """A file that is not opened, or whose content is not unpacked; the message says why, without the remedy."""


def check_regular(path: str | Path) -> int:
    """Refuses what is no regular file, before it is opened: to open a pipe waits for a writer, perhaps for ever.

    Returns:
        Its size in bytes.

    Raises:
        UnusableFileError: It is a folder, pipe, socket or device.
        FileNotFoundError: There is nothing.
        OSError: It cannot be looked at.
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
    """Opens a regular file; raises as `check_regular`."""
    check_regular(path)
    # Not blocking, should something else have taken its name meanwhile.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """The whole of a regular file that is not longer than `max_bytes`; raises as `check_regular`."""
    size = check_regular(path)
    if size > max_bytes:
        raise UnusableFileError(f"{path} has {size} bytes, and at most {max_bytes} are read of such a file")
    with open_regular(path) as file:
        return file.read(max_bytes)


def parse_json(content: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parses a JSON text.

    Args:
        content: The text.
        make_object: Makes an object of its keys and values; a dict by default.

    Raises:
        ValueError: It is no JSON, or nested more deeply than any that is read here.
    """
    try:
        return json.loads(content, object_pairs_hook=make_object)
    except RecursionError as error:
        raise UnusableFileError("it is nested too deeply") from error


def read_json(path: str | Path) -> Any:
    """Parses a JSON file; raises as `read_regular` and `parse_json`."""
    return parse_json(read_regular(path, MAX_JSON_BYTES))


def read_yaml_text(path: str | Path) -> str:
    """The text of a YAML file whose references, written out, are not many more nodes than it has letters.

    Raises:
        yaml.YAMLError: It is no YAML.
        OSError, UnicodeDecodeError: It cannot be read, is no regular file, too long, too deep, or refers to itself.
    """
    text = read_regular(path, MAX_YAML_BYTES).decode()
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
    """Nodes below, each reference counted as often as it is used."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise UnusableFileError("a value refers to itself")
    if id(node) not in known:
        children = [child for pair in node.value for child in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_nodes(child, known, above | {id(node)}) for child in children)
    return known[id(node)]


def check_expansion(num_bytes: int, file_bytes: int, what: str) -> None:
    """Refuses what would unpack to far more bytes than its file has.

    Args:
        num_bytes: That it would fill.
        file_bytes: Of the file.
        what: Names it in the message.

    Raises:
        UnusableFileError: It is more than 256 MiB and more than 64 times the file.
    """
    if num_bytes > max(_EXPANDED_BYTES, _EXPANSION * file_bytes):
        raise UnusableFileError(f"{what} would unpack to {num_bytes} bytes from a file of {file_bytes}")


def check_zip(entries: Sequence[zipfile.ZipInfo], file_bytes: int, source: str) -> None:
    """Refuses a zip file whose entries together expand far beyond it, or share its bytes; reads nothing of them.

    Raises:
        UnusableFileError: It is such a file.
    """
    if sum(entry.compress_size for entry in entries) > file_bytes:
        raise UnusableFileError(f"{source} has entries that claim more bytes than the file has")
    check_expansion(sum(entry.file_size for entry in entries), file_bytes, source)


def inside(name: Any) -> str:
    """A file's name relative to a folder, as data gives it, which cannot lead out of the folder.

    Raises:
        UnusableFileError: It is no such name: absolute, with `..`, a backslash, a NUL, or an address.
    """
    is_plain = isinstance(name, str) and bool(name) and not any(sign in name for sign in "\\\0") and "://" not in name
    if not is_plain or name.startswith("/") or {"..", ".", ""} & {*name.split("/")}:
        raise UnusableFileError(f"{name!r} is no name of a file below its folder")
    return str(PurePosixPath(name))


def check_stays(root: str | Path, name: str) -> None:
    """Refuses a file that a symbolic link takes out of its folder.

    Raises:
        UnusableFileError: It lies elsewhere.
    """
    real = os.path.realpath(os.path.join(root, name))
    if not Path(real).is_relative_to(os.path.realpath(root)):
        raise UnusableFileError(f"{name!r} is a link out of its folder, to {real}")
