"""Reads and writes files of weights. Pickled code is never executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from raywgen.files import in_one_step, remedy
from raywgen.weights.copy_plan import SAFETENSORS_DTYPES
from raywgen.weights.errors import WeightsError
from raywgen.weights.reader import WeightsReader
from raywgen.weights.safetensors_writer import write_safetensors
from raywgen.weights.tensors import StateDict, find_ties


def load_state_dict(path: str | Path) -> StateDict:
    """Reads a `.safetensors` file, or a torch file with a `state_dict` in it.

    Raises:
        WeightsError: The file is missing, truncated, or of another kind.
        UnsafeFileError: The file is a pickle that asks for more than tensors; it is not executed.
    """
    packed = WeightsReader().read(path)
    state = packed.layout.unpack(torch.from_numpy(packed.packed_P))
    return {packed.prefix + name: tensor for name, tensor in state.items()}


def save_state_dict(state_dict: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes `.safetensors` in one step: a reader sees the whole file or none.

    Raises:
        WeightsError: The disk is full, the folder cannot be written, or safetensors have no such dtype; no partial file
            remains.
    """
    path = Path(path)
    for name, tensor in state_dict.items():
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in SAFETENSORS_DTYPES:
            raise WeightsError(f"cannot write {path}: safetensors hold no {dtype} (tensor '{name}'); convert it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Tied weights share memory, which safetensors refuses: each name gets a copy of its own, and the metadata
        # record the ties as safetensors' `save_model` does.
        metadata = metadata | find_ties(state_dict)
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()}
        with in_one_step(path) as partial:
            write_safetensors(copies, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write {path}: {error}; {remedy(error)} and run the same command again") from error
