"""Writes safetensors reproducibly: equal tensors and metadata give equal bytes in every process.

The library keeps metadata in a hash map whose order changes from process to process, and sorts tensors by dtype and
name. So the header is sorted afterwards: the metadata by key, and the tensors as they were given, so that a file keeps
the order of its architecture. The offsets of the tensors stay as the library wrote them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as library
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_FORMAT = {"format": "pt"}
_METADATA_KEY = b'"__metadata__":'


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes a file in place; the caller gives it its final name.

    Args:
        tensors: Contiguous tensors, none of which shares memory with another.
        path: Path of the file.
        metadata: Metadata for the header; `format: pt`, which loaders require, is added if it is missing.

    Raises:
        SafetensorError, OSError: The file cannot be written.
    """
    library.save_file(dict(tensors), path, _FORMAT | dict(metadata))
    with Path(path).open("r+b") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = _in_order(file.read(length), tensors)
        file.seek(_LENGTH.size)
        file.write(header)


def is_writable(dtype: torch.dtype) -> bool:
    """Whether safetensors can hold values of a dtype."""
    try:
        library.save({"x": torch.empty(0, dtype=dtype)})
    except (SafetensorError, KeyError, ValueError):
        return False
    return True


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata in the header of a safetensors file; empty if the file is damaged or of another kind."""
    with Path(path).open("rb") as file:
        start = file.read(_LENGTH.size + 1)
        if len(start) <= _LENGTH.size or start[-1:] != b"{":
            return {}
        (length,) = _LENGTH.unpack_from(start)
        if length > Path(path).stat().st_size:
            return {}
        header = b"{" + file.read(length - 1)
    place = header.find(_METADATA_KEY)
    try:
        text = header[place + len(_METADATA_KEY) :].decode() if place >= 0 else "{}"
        found, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except ValueError:
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns the content of the file that `write_safetensors` writes."""
    content = library.save(dict(tensors), _FORMAT | dict(metadata))
    (length,) = _LENGTH.unpack_from(content)
    end = _LENGTH.size + length
    return content[: _LENGTH.size] + _in_order(content[_LENGTH.size : end], tensors) + content[end:]


def _in_order(header: bytes, names: Iterable[str]) -> bytes:
    """Sorts the metadata of a header, and puts its tensors in the order of `names`; its length does not change."""
    content = json.loads(header)
    metadata = {_METADATA: dict(sorted(content[_METADATA].items()))} if _METADATA in content else {}
    content = metadata | {name: content[name] for name in names}
    ordered = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(ordered) <= len(header), "the library writes compact JSON"
    return ordered.ljust(len(header))
