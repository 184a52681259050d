"""Inputs without labels, read batch by batch from files, so that memory does not grow with their number.

Shape legend: S inputs, C channels, H height, W width.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pyarrow import fs
from torch import Tensor

from raywgen.inputs import check_regular, check_zip
from raywgen.tasks.base import TaskError
from raywgen.tasks.encoded_images import FolderImages, TableImages, listed
from raywgen.tasks.images import OnProgress, channel_statistics, decoded, normalise
from raywgen.tasks.text_datasets import find_files, open_tables
from raywgen.weights.cache import FOLDER, cache_folder

_PARQUET = (".parquet", ".pq")
_ARRAYS = (".npy", ".npz")
_CHANNELS = (1, 3)
_TAKEN = "a Parquet file of images, a folder of PNG or JPEG files, or an .npy or .npz file with an array x"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnlabelledInputs:
    """Inputs that lie on a disk.

    Attributes:
        name: Path that they came from, for messages.
        stored: All stored inputs `(S, ...)`, mapped into memory: pixels uint8 `(S, C, H, W)`, or other numbers.
        chosen_S: The numbers of those that are used, in random order.
    """

    name: str
    stored: Tensor
    chosen_S: Tensor

    def __len__(self) -> int:
        return len(self.chosen_S)

    @property
    def has_pixels(self) -> bool:
        """Whether the inputs are uint8 images, which are to be standardised."""
        return self.stored.dtype == torch.uint8 and self.stored.dim() == 4

    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and standard deviation of each channel of all stored pixels, taken as 0 to 1."""
        return channel_statistics(self.stored)

    def batches(self, batch_size: int, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Iterator[Tensor]:
        """Yields the inputs in random order, float32 `(S, ...)`, in batches that differ by one input at most.

        Args:
            batch_size: Most inputs of a batch.
            mean: Mean of each channel by which pixels are standardised.
            std: Their standard deviation.

        Raises:
            TaskError: `mean` or `std` do not fit the channels, or inputs are NaN or infinite.
        """
        for rows in self.chosen_S.tensor_split(-(-len(self) // batch_size)):
            x = self.stored[rows]
            if self.has_pixels:
                yield normalise(x, mean=mean, std=[deviation or 1.0 for deviation in std])
                continue
            if x.is_floating_point() and not bool(x.isfinite().all()):
                row = int(rows[x.flatten(1).isfinite().all(dim=1).logical_not()][0])
                raise TaskError(f"{self.name}: input {row} holds NaN or infinity; drop it")
            yield x.float()


def open_unlabelled(
    path: str | os.PathLike[str],
    *,
    num: int = 0,
    size: int | None = None,
    channels: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> UnlabelledInputs:
    """Opens inputs, of which labels are neither needed nor read.

    Images are decoded into the cache, as `load_images` does, and arrays of an `.npz` file unpacked to a file that is
    removed when the process ends.

    Args:
        path: A Parquet file with a column `image`, a glob of several, or `hf://datasets/...`; a folder that holds PNG
            or JPEG files, itself or in folders inside; an `.npy` file, or an `.npz` file with an array `x`.
        num: Number of inputs to draw at random, without replacement; 0, or more than there are, takes all.
        size: Height and width in pixels to resize images to; None keeps the stored size.
        channels: 1 for grey, 3 for RGB; None keeps what is stored.
        seed: Seed of the draw and of the order.
        on_progress: Called with images decoded and images to decode; never where they come from the cache.

    Raises:
        TaskError: Something is missing, damaged, of unequal size, or of another kind.
    """
    name, draw = os.fspath(path), np.random.default_rng(seed)
    ending = os.path.splitext(name)[1].lower()
    if ending in _ARRAYS:
        if size is not None or channels is not None:
            raise TaskError(f"{name}: arrays are taken as they are; leave out size= and channels=, or give image files")
        stored = _channels_first(torch.from_numpy(_array(name)), name)
        chosen_S = draw.permutation(len(stored))[: num or None]
        return UnlabelledInputs(name=name, stored=stored, chosen_S=torch.from_numpy(chosen_S))
    rows = _images(name, ending)
    chosen_S = np.sort(draw.permutation(len(rows))[: num or None])
    pixels = torch.from_numpy(decoded(rows, chosen_S, size, channels, on_progress))
    return UnlabelledInputs(name=name, stored=pixels, chosen_S=torch.from_numpy(draw.permutation(len(pixels))))


def _images(name: str, ending: str) -> TableImages | FolderImages:
    filesystem, infos = find_files(name)
    if infos[0].type == fs.FileType.Directory:
        root = infos[0].path
        inside = [one.path for one in listed(filesystem, root) if one.type == fs.FileType.Directory]
        return FolderImages(filesystem, root, [root, *inside], "PNG or JPEG files, itself or in folders inside")
    if ending not in _PARQUET:
        raise TaskError(f"{name}: this kind of file is not read; give {_TAKEN}")
    return TableImages(open_tables(name))


def _array(name: str) -> np.ndarray:
    """Returns an array of numbers, mapped into memory, copied on write."""
    try:
        size = check_regular(name)
        if name.lower().endswith(".npy"):
            array = np.load(name, mmap_mode="c", allow_pickle=False)
        else:
            array = _unpacked(name, size)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"{name}: {error}; give an .npy file, or an .npz file with an array x") from error
    if array.dtype.kind not in "biuf" or array.ndim < 2 or not array.size:
        raise TaskError(f"{name} holds {array.dtype} of shape {list(array.shape)}; give numbers of shape [S, ...]")
    return array


def _unpacked(name: str, size: int) -> np.ndarray:
    """Unpacks the array `x` of an `.npz` file, or its only one, to a nameless file."""
    with zipfile.ZipFile(name) as archive:
        check_zip(archive.infolist(), size, name)
        members = {member.filename.removesuffix(".npy").lower(): member for member in archive.infolist()}
        member = next(iter(members.values())) if len(members) == 1 else members.get("x")
        if member is None:
            raise TaskError(f"{name} holds {', '.join(members) or 'no arrays'}; give an array x, inputs first")
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, path = tempfile.mkstemp(dir=folder, prefix=".unpacked.", suffix=".npy")
        try:
            with os.fdopen(handle, "wb") as target, archive.open(member) as source:
                _copied(source, target, name)
            return np.load(path, mmap_mode="c", allow_pickle=False)
        finally:
            Path(path).unlink()


def _copied(source: object, target: object, name: str) -> None:
    try:
        shutil.copyfileobj(source, target, 1 << 20)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise TaskError(
            f"{name} cannot be unpacked ({error}); free some disk space, or name another folder by {FOLDER}"
        ) from error


def _channels_first(stored: Tensor, name: str) -> Tensor:
    """Returns uint8 images as `(S, C, H, W)`, and anything else as it is."""
    if stored.dtype != torch.uint8 or stored.dim() not in (3, 4):
        return stored
    if stored.dim() == 3:
        return stored.unsqueeze(1)
    if stored.shape[1] not in _CHANNELS and stored.shape[3] in _CHANNELS:
        return stored.permute(0, 3, 1, 2)
    if stored.shape[1] not in _CHANNELS:
        raise TaskError(
            f"{name} holds uint8 of shape {list(stored.shape)}; give images [S, C, H, W] with 1 or 3 channels"
        )
    return stored
