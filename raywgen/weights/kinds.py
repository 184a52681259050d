"""Recognises the format of a file by its first bytes, whatever its name."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from typing import IO

HEAD_BYTES = 512
MAX_HEADER_BYTES = 100 << 20
PICKLED = (".pt", ".pth", ".th", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
SUFFIXES = (".safetensors", *PICKLED)
ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_UNPACK = "unpack it"
_CONVERT = "convert it to .safetensors"


@dataclass(frozen=True, slots=True)
class Foreign:
    """The format of a file that is not read as weights.

    Attributes:
        what: A phrase for the message, with the remedy.
        is_broken: Whether the file should have been weights (a failed download), or is a network to be saved again.
    """

    what: str
    is_broken: bool = False


_MAGIC = {
    b"GGUF": Foreign(f"is a GGUF file; {_CONVERT}"),
    b"ggjt": Foreign(f"is a GGML file; {_CONVERT}"),
    b"\x89HDF\r\n\x1a\n": Foreign(f"is an HDF5 file (Keras, TensorFlow); {_CONVERT}"),
    b"\x93NUMPY": Foreign("is a NumPy array; save a state_dict"),
    b"\x1f\x8b": Foreign(f"is compressed by gzip; {_UNPACK}"),
    b"BZh": Foreign(f"is compressed by bzip2; {_UNPACK}"),
    b"\xfd7zXZ\x00": Foreign(f"is compressed by xz; {_UNPACK}"),
    b"\x28\xb5\x2f\xfd": Foreign(f"is compressed by zstd; {_UNPACK}"),
    b"7z\xbc\xaf\x27\x1c": Foreign(f"is a 7z archive; {_UNPACK}"),
    b"Rar!": Foreign(f"is a RAR archive; {_UNPACK}"),
    b"version https://git-lfs": Foreign("is a Git LFS pointer, not the file; run `git lfs pull`", is_broken=True),
}
_BY_SUFFIX = {
    ".onnx": Foreign(f"is an ONNX graph; {_CONVERT}"),
    ".msgpack": Foreign(f"is a msgpack file (Flax); {_CONVERT}"),
    ".pb": Foreign(f"is a TensorFlow graph; {_CONVERT}"),
    ".tflite": Foreign(f"is a TensorFlow Lite graph; {_CONVERT}"),
    ".distcp": Foreign(
        "is a part of a torch.distributed checkpoint; join the parts by "
        "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`"
    ),
}
_TORCH_SCRIPT = Foreign(
    "is a TorchScript archive, whose code is never executed; save torch.jit.load(...).state_dict() alone",
    is_broken=True,
)


def weights_suffix(name: str) -> str:
    """Returns the suffix of a file name by which it holds weights, as it is spelled; empty if there is none."""
    lower = name.lower()
    for suffix in SUFFIXES:  # None of them ends in another one.
        if lower.endswith(suffix):
            return name[-len(suffix) :] if len(suffix) < len(name) else ""
    return ""


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of this size that begins so is a safetensors file."""
    return len(head) > 8 and 2 <= int.from_bytes(head[:8], "little") <= min(MAX_HEADER_BYTES, size) and head[8] == 0x7B


def is_pickle(head: bytes) -> bool:
    """Whether a file begins as a pickle does, torch's or another."""
    return _PICKLE.match(head) is not None


def foreign(head: bytes, name: str) -> Foreign | None:
    """Recognises a foreign format by the first bytes, or by the name if it has no signature; None if unknown."""
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return Foreign("is a web page or XML text, not the file: the download failed; fetch it again", is_broken=True)
    if head[257:262] == b"ustar":
        return Foreign(f"is a tar archive; {_UNPACK}")
    known = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if known is not None or is_pickle(head):
        return known
    return next((kind for suffix, kind in _BY_SUFFIX.items() if name.lower().endswith(suffix)), None)


def foreign_archive(file: IO[bytes]) -> Foreign | None:
    """Recognises the format of an open zip file; None if torch wrote it, or if it is damaged."""
    try:
        names = zipfile.ZipFile(file).namelist()
    except Exception:  # damage makes zipfile raise nearly anything
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return _TORCH_SCRIPT
    if any(name.rpartition("/")[2] == "archive_format" or "/models/" in name for name in names):
        return Foreign("is a torch.export archive; save torch.export.load(...).state_dict alone", is_broken=True)
    if sum(name.endswith("/data.pkl") for name in names) == 1:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return Foreign(f"is a NumPy archive (.npz); {_CONVERT}")
    if any(name.endswith(".weights.h5") for name in names):
        return Foreign(f"is a Keras archive; {_CONVERT}")
    return Foreign(f"is a zip archive and no torch file; {_UNPACK}")
