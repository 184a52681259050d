"""Weights in and out of files. Pickled code is never executed."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raywgen.weights.errors import UnsafeFileError, WeightsError
from raywgen.weights.layout import StateDict

_PICKLED = {".pt", ".pth", ".th", ".bin"}


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
            f"{path} holds pickled code or objects, which are never executed; "
            "save the state_dict alone, best as .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is truncated or no torch file ({error}); fetch it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
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
        save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        remedy = "free some disk space" if full else "check the folder and its permissions"
        raise WeightsError(f"cannot write {path}: {error}; {remedy} and run the same command again") from error
