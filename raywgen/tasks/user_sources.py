"""Reads inputs and labels from the forms in which users hold them; `user_data` checks the result.

Shape legend: S samples, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from raywgen.inputs import check_regular, check_zip
from raywgen.tasks.base import TaskError
from raywgen.tasks.images import load_images
from raywgen.tasks.preprocessing import InputForm
from raywgen.tasks.text_datasets import find_files, open_tables

INPUTS = ("x", "image", "images", "img", "input", "inputs", "sample", "samples", "features", "pixel_values", "data")
LABELS = ("y", "label", "labels", "target", "targets", "class", "classes")
TAKEN = (
    "(samples, labels) as tensors or arrays, a DataLoader or Dataset, a mapping or table with columns x and y, or the "
    "path of an .npz file with x and y, of a Parquet file, or of a folder of class folders with images"
)
_MOST_UNSIZED = 1 << 16
_DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error)
_PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")


class ConditionError(TaskError):
    """Instruction or data of a user's own that cannot be used; the message names the remedy."""


Raw = tuple[Any, Any]
"""Inputs and labels as they were found; labels None where there are none."""


def raw_data(data: Any, form: InputForm | None) -> Raw:
    """Returns inputs and labels of anything that `TAKEN` lists, or the inputs alone of a single array.

    Raises:
        ConditionError: It is something else, or has parts missing.
        TaskError: A file cannot be read.
    """
    if isinstance(data, str | os.PathLike):
        return _of_path(os.fspath(data), form)
    if isinstance(data, Tensor | np.ndarray):
        return data, None
    if isinstance(data, pa.Table):
        return _of_columns("the table", data.column_names, lambda name: _of_rows(data.column(name).to_pylist()))
    if isinstance(data, Mapping):
        return _of_mapping(data)
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        columns = {str(name): name for name in data.columns}  # Names of columns may be numbers.
        return _of_columns("the table", list(columns), lambda name: _of_rows(list(data[columns[name]])))
    if isinstance(getattr(data, "column_names", None), list):
        return _of_columns("the data set", data.column_names, lambda name: _of_rows(list(data[name])))
    if isinstance(data, DataLoader):
        return _joined(data, form, is_batched=data.batch_size is not None or data.batch_sampler is not None)
    if isinstance(data, tuple | list) and len(data) == 2 and not _is_pair(data[0]):
        return data[0], data[1]
    if isinstance(data, tuple):
        raise ConditionError(f"data is a tuple of {len(data)}; give a pair (samples, labels)")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _joined((data[index] for index in range(len(data))), form, is_batched=False)
    if isinstance(data, Iterable):
        return _joined(_bounded(data), form, is_batched=False)
    raise ConditionError(f"data is a {type(data).__name__}; give {TAKEN}")


def pixels(image: Image.Image, form: InputForm | None) -> np.ndarray:
    """Returns pixels uint8 `(C, H, W)` of an image, in the size and colours that a generator was trained on."""
    channels, size = (None, None) if form is None else (form.channels, form.size)
    is_grey = channels == 1 if channels else image.mode in ("1", "L", "LA", "La")
    image = image.convert("L" if is_grey else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if is_grey else np.ascontiguousarray(array.transpose(2, 0, 1))


def _of_path(path: str, form: InputForm | None) -> Raw:
    ending = os.path.splitext(path)[1].lower()
    if ending in (".npz", ".npy"):
        return _of_arrays(path)
    if ending in _PICKLED:
        raise ConditionError(f"{path}: pickled data is never read; save it by np.savez('data.npz', x=..., y=...)")
    infos = find_files(path)[1]
    if ending in (".parquet", ".pq") and not _has_images(path):
        tables = open_tables(path)
        names = tables[0].schema.names
        return _of_columns(
            path, names, lambda name: _of_rows([value for table in tables for value in table.values(name)])
        )
    if ending not in (".parquet", ".pq") and infos[0].is_file:
        raise ConditionError(f"{path}: this kind of file is not read; give {TAKEN}")
    size, channels = (None, None) if form is None else (form.size, form.channels)
    data = load_images(path, size=size, channels=channels)
    # Only classes that occur have a number: a file may hold a part of a data set.
    present_C, labels_S = data.y_S.unique(return_inverse=True)
    names = np.asarray([data.class_names[int(number)] for number in present_C], dtype=object)
    return data.x_SCHW, Named(labels_S, tuple(names))


class Named:
    """Labels whose classes have names."""

    def __init__(self, labels_S: Tensor, names: tuple[str, ...]) -> None:
        self.labels_S, self.names = labels_S, names


def _has_images(path: str) -> bool:
    table = open_tables(path)[0]
    stored = {entry.get("_type") for entry in table.features.values()}
    return "image" in table.schema.names or "Image" in stored


def _of_arrays(path: str) -> Raw:
    try:
        size = check_regular(path)
        # Mapped, an array cannot be longer than its file; copied on write, the file stays as it is.
        loaded = np.load(path, mmap_mode="c", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return np.asarray(loaded), None
        with loaded as arrays:
            check_zip(arrays.zip.infolist(), size, path)
            names = {name.lower(): name for name in arrays.files}
            if "x" not in names:
                raise ConditionError(
                    f"{path}: it holds {', '.join(arrays.files) or 'no arrays'}; give an .npz file with arrays x "
                    "(samples first) and y"
                )
            return arrays[names["x"]], arrays[names["y"]] if "y" in names else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, RecursionError, *_DAMAGED_ZIP) as error:
        if isinstance(error, ConditionError):
            raise
        raise ConditionError(f"{path}: {error}; give an .npz file with arrays x (samples first) and y") from error


def _of_mapping(data: Mapping[Any, Any]) -> Raw:
    names = [str(name) for name in data]
    if not _found(names, INPUTS) and data and all(hasattr(part, "column_names") for part in data.values()):
        raise ConditionError(f"data has the parts {', '.join(names)}; give one of them, such as data['{names[0]}']")
    columns = {str(name): value for name, value in data.items()}
    return _of_columns("the mapping", names, lambda name: columns[name])


def _of_columns(source: str, names: Sequence[str], column: Callable[[str], Any]) -> Raw:
    """Picks columns of inputs and labels by name; without one of inputs, all other columns together are the inputs."""
    label = _found(names, LABELS)
    if wanted := _found(names, INPUTS):
        return column(wanted), None if label is None else column(label)
    others = [name for name in names if name != label]
    if label is None or not others:
        raise ConditionError(f"{source} has columns {', '.join(names)}; name the inputs x and the labels y")
    values = [np.asarray(column(name)) for name in others]
    if odd := [name for name, value in zip(others, values, strict=True) if value.dtype.kind not in "biuf"]:
        raise ConditionError(f"{source}: column '{odd[0]}' holds no numbers; name the inputs x and the labels y")
    return np.stack([value.astype(np.float32) for value in values], axis=1), column(label)


def _found(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    known = {name.lower(): name for name in names}
    return next((known[name] for name in wanted if name in known), None)


def _of_rows(values: list[Any]) -> Any:
    """Returns a column's cells; in tables of the hub they may hold the bytes of image files."""
    if values and isinstance(values[0], Mapping) and "bytes" in values[0]:
        raise ConditionError("a column holds encoded images; give the path of the Parquet file instead of its rows")
    return values


def _is_pair(item: Any) -> bool:
    """Whether it is one sample with its label, and not all samples."""
    if not isinstance(item, tuple | list) or len(item) != 2 or isinstance(item[0], int | float):
        return False
    return isinstance(item[1], int | float) or (np.ndim(item[1]) == 0 and not isinstance(item[1], str))


def _bounded(items: Iterable[Any]) -> Iterator[Any]:
    """Yields all items of an iterable, and refuses one that has no end."""
    first = list(itertools.islice(items, _MOST_UNSIZED + 1))
    if len(first) > _MOST_UNSIZED:
        raise ConditionError(
            f"data goes on after {_MOST_UNSIZED:,} samples and says no length; give a part of it, for instance by "
            "itertools.islice(data, 1000)"
        )
    return iter(first)


def _joined(items: Iterable[Any], form: InputForm | None, *, is_batched: bool) -> Raw:
    """Joins all items or batches of a data set."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    try:
        for item in items:
            x, y = _of_item(item)
            part = as_tensor(pixels(x, form) if isinstance(x, Image.Image) else x, "samples")
            xs.append(part if is_batched else part.unsqueeze(0))
            if y is not None:
                label = as_tensor(y, "labels")
                ys.append(label if is_batched else label.unsqueeze(0))
    except TaskError:
        raise
    except Exception as error:  # The code of the user's own data set may raise anything.
        raise ConditionError(
            f"data: sample {len(xs)} cannot be read ({type(error).__name__}: {error}); mend the data set"
        ) from error
    if not xs:
        raise ConditionError("data is empty; give at least one sample")
    if len({part.shape[1:] for part in xs}) > 1:
        raise ConditionError(
            f"data: samples differ in shape, {list(xs[0].shape[1:])} and others; bring them to one shape"
        )
    return torch.cat(xs), torch.cat(ys) if ys else None


def _of_item(item: Any) -> Raw:
    if isinstance(item, Mapping):
        return _of_mapping(item)
    if isinstance(item, tuple | list):
        if len(item) < 2:
            return (item[0], None) if item else (item, None)
        return item[0], item[1]
    return item, None


def as_tensor(value: Any, what: str) -> Tensor:
    """Returns a strided, detached tensor of numbers on the CPU; uint8 stays uint8.

    Raises:
        ConditionError: It holds no numbers, or rows of different shapes.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
        return (tensor.to_dense() if tensor.layout != torch.strided else tensor).cpu()
    try:
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            return torch.stack([part.detach().cpu() for part in value])
        if isinstance(value, list | tuple) and value and isinstance(value[0], Image.Image):
            raise ConditionError(f"{what}: a column holds images; give the path of the files instead")
        array = np.asarray(value)
        if array.dtype == object:
            array = np.stack([np.asarray(part) for part in array])
    except (ValueError, RuntimeError, TypeError) as error:
        if isinstance(error, ConditionError):
            raise
        raise ConditionError(f"data: {what} differ in shape; bring them to one shape") from error
    if array.dtype.kind not in "biuf":
        raise ConditionError(f"data: {what} are {array.dtype}; give numbers")
    kept = array.dtype in (np.uint8, np.float32, np.int64, np.bool_)
    wide = np.float32 if array.dtype.kind == "f" else np.int64
    return torch.from_numpy(np.array(array, dtype=array.dtype if kept else wide, order="C"))
