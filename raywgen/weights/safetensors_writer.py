"""The one place that writes safetensors: equal tensors and metadata give equal bytes, whichever process writes them.

The library keeps metadata in a hash map whose order changes from process to process, so its header is put in order
afterwards. Names of tensors need no order of ours: the library sorts them by dtype and name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import torch as library
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes a file in place; the caller gives it its final name.

    Args:
        tensors: Contiguous, and none of them shares memory with another.
        path: Of the file.
        metadata: Goes to the header, sorted by key.

    Raises:
        SafetensorError, OSError: It cannot be written.
    """
    library.save_file(dict(tensors), path, dict(metadata))
    with Path(path).open("r+b") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = _in_order(file.read(length))
        file.seek(_LENGTH.size)
        file.write(header)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of the file that `write_safetensors` writes."""
    content = library.save(dict(tensors), dict(metadata))
    (length,) = _LENGTH.unpack_from(content)
    end = _LENGTH.size + length
    return content[: _LENGTH.size] + _in_order(content[_LENGTH.size : end]) + content[end:]


def _in_order(header: bytes) -> bytes:
    """The same header, as long, with its metadata sorted."""
    content = json.loads(header)
    if _METADATA in content:
        content[_METADATA] = dict(sorted(content[_METADATA].items()))
    ordered = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(ordered) <= len(header), "the library writes compact JSON"
    return ordered.ljust(len(header))
