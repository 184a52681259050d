"""Weights in and out of files. Pickled code is never executed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raywgen.weights.errors import UnsafeFileError, WeightsError
from raywgen.weights.layout import StateDict

_PICKLED = {".pt", ".pth", ".th", ".bin"}
_DISK_FULL = ("No space left", "File too large", "Disk quota exceeded")


def load_state_dict(path: str | Path) -> StateDict:
    """Reads a `.safetensors` file, or a torch file that holds nothing but tensors.

    Raises:
        WeightsError: The file is missing, truncated, or of another kind.
        UnsafeFileError: The file is a pickle that asks for more than tensors; it is not executed.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; give a .safetensors or .pt file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error
    if path.suffix not in _PICKLED:
        raise WeightsError(f"{path}: unknown kind of weights file; give .safetensors, .pt, .pth, .th or .bin")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path} holds pickled code or objects, which are never executed, or is damaged; "
            "save the state_dict alone, best as .safetensors"
        ) from error
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        raise WeightsError(f"{path} is truncated or no torch file ({error}); fetch it again") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise WeightsError(f"{path} holds no plain state_dict; save module.state_dict() alone")
    return content


def save_state_dict(state_dict: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes `.safetensors` in one step: a reader sees the whole file or none.

    Raises:
        WeightsError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Tied weights share memory, which safetensors refuses: each name gets a copy of its own.
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()}
        save_file(copies, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        full = any(text in str(error) for text in _DISK_FULL)
        remedy = "free some disk space or raise the quota" if full else "check the folder and its permissions"
        raise WeightsError(f"cannot write {path}: {error}; {remedy} and run the same command again") from error
