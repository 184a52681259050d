"""Labelled images: Parquet files as the Hugging Face hub has them, folders of class folders, scikit-learn's digits.

Images are decoded once: the decoded array lies in `cache_folder()` and is memory-mapped by every later load.

Shape legend: S samples, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
import PIL
import torch
from PIL import Image
from pyarrow import fs
from torch import Tensor

from raywgen.tasks.base import TaskError
from raywgen.tasks.encoded_images import Encoded, EncodedImages, FolderImages, TableImages, holds_bytes, listed
from raywgen.tasks.subsets import balanced_rows
from raywgen.tasks.text_datasets import LabelledTable, class_names, find_files, open_tables
from raywgen.weights.cache import FOLDER, load_bytes_array, store_bytes_array

OnProgress = Callable[[int, int], None]

_ROWS_OF_A_THREAD = 128
_IMAGES_OF_A_HISTOGRAM = 1024
# Pillow would hand PostScript to another program, which runs it.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MAX_PIXELS = 1 << 26
_PIXELS_OF_A_BYTE = 512
"""A small file may always have up to 4 million: an even surface packs well."""
_GREY_MODES = ("1", "L", "LA", "La")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageData:
    """Images of one size with the class of each.

    Attributes:
        name: Name of the data.
        x_SCHW: Pixels, uint8 `(S, C, H, W)` with C = 1 (grey) or 3 (RGB); as a rule memory-mapped.
        y_S: Class of each image, int64 `(S,)`.
        class_names: Name of each class.
        columns: Further facts of each image, S values a column: alphabet, character, drawer and the like.
        source: Origin of the data.
        licence: Licence under which it may be used.
    """

    name: str
    x_SCHW: Tensor
    y_S: Tensor
    class_names: tuple[str, ...]
    columns: dict[str, tuple] = field(default_factory=dict)
    source: str
    licence: str = "unknown"


def load_images(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> ImageData:
    """Reads labelled images, decoding them only if no earlier call has.

    Args:
        path: A Parquet file with columns `image` and `label`, a glob of several, `hf://datasets/...`, or a folder
            with one folder a class that holds PNG or JPEG files.
        size: Height and width in pixels to resize to, whatever the aspect, antialiased; None keeps the stored size.
        channels: 1 for grey, 3 for RGB; None keeps what is stored.
        limit: Number of images to keep, in their stored order, with as equal numbers of each class as the data allow.
        seed: Seed of the choice of these images.
        on_progress: Called with images decoded and images to decode; never where they come from the cache.

    Raises:
        TaskError: Something is missing, damaged, of unequal size, or asked for in vain; names the file and row.
    """
    if any(number is not None and number < 1 for number in (size, limit)) or channels not in (None, 1, 3) or seed < 0:
        raise TaskError(
            f"size={size}, limit={limit}, channels={channels}, seed={seed}: give positive numbers, and 1 or 3 channels"
        )
    filesystem, infos = find_files(path)
    is_folder = infos[0].type == fs.FileType.Directory
    rows: _LabelledImages = (
        _ClassFolders(filesystem, infos[0].path) if is_folder else _LabelledTables(open_tables(path))
    )
    chosen_S = np.arange(len(rows.labels_S)) if limit is None else balanced_rows(rows.labels_S, limit, seed)
    pixels = decoded(rows, chosen_S, size, channels, on_progress)
    return ImageData(
        name=PurePosixPath(infos[0].path if len(infos) == 1 else os.fspath(path)).stem,
        x_SCHW=torch.from_numpy(pixels),
        y_S=torch.from_numpy(rows.labels_S[chosen_S]),
        class_names=rows.class_names,
        columns={name: tuple(values[row] for row in chosen_S) for name, values in rows.columns().items()},
        source=os.fspath(path),
    )


def load_digits_images() -> ImageData:
    """Loads scikit-learn's 1,797 real handwritten digits: 1 channel, 8x8 pixels, stretched from 0..16 to 0..255."""
    from sklearn.datasets import load_digits  # Late, as in `raywgen.tasks.digits`.

    data, target = load_digits(return_X_y=True)
    pixels = np.rint(np.asarray(data) * (255 / 16)).astype(np.uint8)
    return ImageData(
        name="digits",
        x_SCHW=torch.from_numpy(pixels.reshape(-1, 1, 8, 8)),
        y_S=torch.from_numpy(np.asarray(target, dtype=np.int64)),
        class_names=tuple(map(str, range(10))),
        source="sklearn.datasets.load_digits (UCI, Optical Recognition of Handwritten Digits, test part)",
        licence="CC BY 4.0",
    )


def channel_statistics(x_SCHW: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the exact mean and standard deviation of each channel of uint8 pixels, taken as 0 to 1.

    Raises:
        TaskError: The pixels are no uint8 `(..., C, H, W)`, or there are none.
    """
    _check_pixels(x_SCHW)
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(x_SCHW.shape[-3]):
        # Both follow from a histogram, which needs no float copy of the pixels.
        parts = x_SCHW[..., channel, :, :].split(_IMAGES_OF_A_HISTOGRAM)
        share = torch.zeros(256, dtype=torch.float64)
        for part in parts:
            share += torch.bincount(part.reshape(-1), minlength=256)
        share /= share.sum()
        mean = float(share @ levels)
        means.append(mean)
        deviations.append(float(share @ (levels - mean) ** 2) ** 0.5)
    return tuple(means), tuple(deviations)


def normalise(x_SCHW: Tensor, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Returns `(x / 255 - mean) / std` per channel.

    Args:
        x_SCHW: Pixels, uint8 `(..., C, H, W)`.
        mean: C means of pixels taken as 0 to 1; measured on these pixels by default.
        std: C standard deviations, also measured by default; a constant channel is then only shifted.

    Returns:
        Float32 of the same shape.

    Raises:
        TaskError: The pixels are not uint8, or `mean` or `std` has another length than C, or a `std` is not positive.
    """
    _check_pixels(x_SCHW)
    if mean is None or std is None:
        means, deviations = channel_statistics(x_SCHW)
        mean = means if mean is None else mean
        std = tuple(value or 1.0 for value in deviations) if std is None else std
    num_channels = x_SCHW.shape[-3]
    if not len(mean) == len(std) == num_channels or min(std) <= 0:
        raise TaskError(f"mean={list(mean)}, std={list(std)}: give {num_channels} of each, and std above 0")
    scale = torch.tensor([1 / (255 * value) for value in std]).reshape(-1, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).reshape(-1, 1, 1)
    return x_SCHW.float().mul_(scale).sub_(shift)


def _check_pixels(x_SCHW: Tensor) -> None:
    if x_SCHW.dtype != torch.uint8 or x_SCHW.dim() < 3 or not x_SCHW.numel():
        raise TaskError(f"pixels {tuple(x_SCHW.shape)} of {x_SCHW.dtype}: give uint8 (..., C, H, W), not empty")


class _LabelledImages(Protocol):
    """Images that are still encoded, with the class of each."""

    labels_S: np.ndarray
    class_names: tuple[str, ...]

    def files(self) -> list[fs.FileInfo]: ...

    def columns(self) -> dict[str, list]: ...

    def encoded(self, chosen_S: np.ndarray) -> Iterator[list[Encoded]]: ...


class _LabelledTables(TableImages):
    def __init__(self, tables: list[LabelledTable]) -> None:
        super().__init__(tables)
        self.labels_S = np.concatenate([table.labels() for table in tables])
        self.class_names = class_names(tables, self.labels_S)

    def columns(self) -> dict[str, list]:
        schema = self.tables[0].schema
        used = (self.column, self.tables[0].column("label", "ClassLabel"))
        names = [entry.name for entry in schema if entry.name not in used and not holds_bytes(entry.type)]
        return {name: [v for table in self.tables for v in table.values(table.column(name))] for name in names}


class _ClassFolders(FolderImages):
    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        # `root/class/image.png`: a file deeper down or directly in the root belongs to no class and is not read.
        folders = [one.path for one in listed(filesystem, root) if one.type == fs.FileType.Directory]
        super().__init__(filesystem, root, folders, "class folders with PNG or JPEG files")
        classes = [PurePosixPath(info.path).parent.name for info in self.infos]
        self.class_names = tuple(sorted(set(classes)))
        self.labels_S = np.searchsorted(np.asarray(self.class_names), np.asarray(classes)).astype(np.int64)

    def columns(self) -> dict[str, list]:
        return {"path": [info.path for info in self.infos]}


def decoded(
    rows: EncodedImages, chosen_S: np.ndarray, size: int | None, channels: int | None, on_progress: OnProgress | None
) -> np.ndarray:
    """Decodes some images, block by block, unless the cache has them.

    Args:
        rows: All images.
        chosen_S: The numbers of those that are wanted, ascending.
        size: As `load_images` takes it.
        channels: As `load_images` takes it.
        on_progress: As `load_images` takes it.

    Returns:
        Pixels uint8 `(S, C, H, W)`, mapped into memory.

    Raises:
        TaskError: An image is damaged, or of another size than the first.
    """
    files = [(info.path, info.size, info.mtime_ns) for info in rows.files()]
    recipe = [files, size, channels, PIL.__version__, hashlib.sha256(chosen_S.tobytes()).hexdigest()]
    name = f"images-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]}.npy"
    cached = load_bytes_array(name)
    if cached is not None:
        return cached
    blocks = _blocks(rows.encoded(chosen_S), len(chosen_S), size, channels, on_progress)
    first = next(blocks)
    try:
        return store_bytes_array(name, (len(chosen_S), *first.shape[1:]), chain([first], blocks))
    except OSError as error:
        raise TaskError(
            f"decoded images cannot be kept ({error}); free some disk space, or name another folder by {FOLDER}"
        ) from error


def _blocks(
    encoded: Iterator[list[Encoded]], total: int, size: int | None, channels: int | None, on_progress: OnProgress | None
) -> Iterator[np.ndarray]:
    """Yields pixels in blocks, all of the first image's shape."""
    decode = partial(_decode_several, size=size, channels=channels)
    shape, done = None, 0
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for block in encoded:
            parts = [block[first : first + _ROWS_OF_A_THREAD] for first in range(0, len(block), _ROWS_OF_A_THREAD)]
            arrays = [array for part in pool.map(decode, parts) for array in part]
            for (where, _), array in zip(block, arrays, strict=True):
                shape = shape or array.shape
                if array.shape != shape:
                    raise TaskError(
                        f"{where} is {_shape_name(array.shape)}, the first image {_shape_name(shape)}; give size= to "
                        "resize all, and channels= to convert all"
                    )
            done += len(block)
            if arrays:
                yield np.stack(arrays)
            if on_progress is not None:
                on_progress(done, total)


def _shape_name(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


def _decode_several(encoded: list[Encoded], *, size: int | None, channels: int | None) -> list[np.ndarray]:
    return [_decode(content, where, size, channels) for where, content in encoded]


def _check_pixels_of(image: Image.Image, num_bytes: int) -> None:
    pixels = image.width * image.height
    if pixels > min(_MAX_PIXELS, max(1 << 22, _PIXELS_OF_A_BYTE * num_bytes)):
        raise ValueError(f"{image.width}x{image.height} pixels from {num_bytes} bytes are not unpacked")


def _decode(content: bytes, where: str, size: int | None, channels: int | None) -> np.ndarray:
    """Returns pixels uint8 `(C, H, W)` of one image."""
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        _check_pixels_of(image, len(content))
        if image.mode.startswith("I"):
            # Pillow clips 16-bit grey to 255 where it should scale it.
            image = Image.fromarray(np.rint(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8))
        is_grey = channels == 1 if channels else image.mode in _GREY_MODES
        image = image.convert("L" if is_grey else "RGB")
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, zlib.error and others.
        raise TaskError(f"{where} holds a damaged image ({error}); replace it or drop the row") from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if is_grey else np.ascontiguousarray(array.transpose(2, 0, 1))
