"""Files of starts that networks share: one flat vector each, mapped into memory in place of read.

A start has as many values as the network, which may be more than a worker should hold.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from raywgen.files import in_one_step, remedy
from raywgen.storage import Storage, StorageError
from raywgen.weights.errors import WeightsError

_NAME = "values"


def write_vector(path: str | Path, num_values: int, parts: Iterable[Tensor]) -> None:
    """Writes a flat vector part by part, as a safetensors file with one tensor, `values`.

    Args:
        path: The file; its folder is created.
        num_values: D.
        parts: Consecutive parts of the vector, float32 on the CPU.

    Raises:
        WeightsError: The file cannot be written; no partial file remains.
    """
    path = Path(path)
    tensor = {"dtype": "F32", "shape": [num_values], "data_offsets": [0, 4 * num_values]}
    header = json.dumps({"__metadata__": {"format": "pt"}, _NAME: tensor}).encode()
    header += b" " * (-len(header) % 8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_one_step(path) as partial, partial.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for part in parts:
                file.write(part.contiguous().numpy().data)
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error}; {remedy(error)} and run the same command again") from error


def fetch_vector(source: str, path: str | Path) -> None:
    """Copies the file of a start from a URI to a local path, unless it is there.

    Raises:
        WeightsError: It cannot be copied.
    """
    if Path(path).is_file():
        return
    try:
        storage, name = Storage.around(source)
        storage.download(name, path)
    except (StorageError, OSError) as error:
        raise WeightsError(f"{source} cannot be copied to {path}: {error}") from error


def map_vector(path: str | Path, num_values: int) -> Tensor:
    """Returns the vector of a file, whose pages are read when they are used.

    Raises:
        WeightsError: The file is missing or damaged, or holds another number of values.
    """
    try:
        with safe_open(str(path), "pt") as file:
            values_D: Tensor = file.get_tensor(_NAME)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); restore it from a copy") from error
    if values_D.shape != (num_values,):
        raise WeightsError(f"{path} holds {tuple(values_D.shape)} values, its layout has {num_values}; restore it")
    return values_D
