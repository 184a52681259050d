"""Labelled images as features of a frozen encoder, encoded once per machine.

Shape legend: S samples, C channels, H height, W width, F values of an image, E features.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from raywgen.tasks.base import TaskError
from raywgen.tasks.encoders import FrozenEncoder, load_encoder
from raywgen.tasks.images import ImageData, channel_statistics, normalise
from raywgen.weights.cache import FOLDER, load_bytes_array, store_bytes_array

OnProgress = Callable[[int, int], None]
Statistics = tuple[Sequence[float], Sequence[float]]
NUM_TURNS = 4
_BATCH = 256
_BYTES = 4  # Bytes of a float32.


def encode_images(
    data: ImageData,
    encoder: str | FrozenEncoder,
    *,
    rotations: bool,
    statistics: Statistics | None = None,
    on_progress: OnProgress | None = None,
) -> ImageData:
    """Returns the same images with features for pixels, encoded only if no earlier call has done so.

    Args:
        data: Images; they are standardised before they are encoded.
        encoder: The encoder, or its name as `load_encoder` takes it.
        rotations: Whether each class turned by 90, 180 and 270 degrees follows as a class of its own, numbered as
            `EpisodeSampler` counts them: class + turn * number of classes.
        statistics: Mean and standard deviation of each channel; of these images by default.
        on_progress: Called with images encoded and images to encode; never where they come from the cache.

    Returns:
        Images with `x_SCHW` float32 `(S, E, 1, 1)`, which `EpisodeSampler` without rotations draws from.

    Raises:
        EncoderError: The encoder is missing or damaged, or does not take these images.
        TaskError: Images to be turned are not square, or the cache's disk is full.
    """
    frozen = load_encoder(encoder) if isinstance(encoder, str) else encoder
    num_features = len(data.y_S) * (NUM_TURNS if rotations else 1)
    mean, std = channel_statistics(data.x_SCHW) if statistics is None else statistics
    recipe = [_content(data.x_SCHW), rotations, [f"{value:.6f}" for value in (*mean, *std)]]
    blocks = encode(data, frozen, rotations=rotations, statistics=(mean, std), on_progress=on_progress)
    features_SE = _cached(frozen, recipe, num_features, blocks)
    return feature_data(data, features_SE, rotations=rotations)


def encode_inputs(x_SF: Tensor, encoder: FrozenEncoder) -> Tensor:
    """Returns features `(S, E)` of a task's inputs, encoded only if no earlier call has done so.

    Args:
        x_SF: Standardised inputs.
        encoder: The encoder.

    Raises:
        EncoderError: The encoder does not take these inputs.
        TaskError: The cache's disk is full.
    """
    blocks = (encoder(part_SF).numpy() for part_SF in x_SF.split(_BATCH))
    return _cached(encoder, [_content(x_SF)], len(x_SF), blocks)


def encode(
    data: ImageData,
    encoder: FrozenEncoder,
    *,
    rotations: bool,
    statistics: Statistics | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[np.ndarray]:
    """Yields features in blocks, float32 `(S, E)`: of all images as they are, then of all for each quarter turn.

    Args:
        data: Images.
        encoder: The encoder.
        rotations: Whether turned images are encoded, too.
        statistics: Mean and standard deviation of each channel; of these images by default.
        on_progress: Called with images encoded and images to encode.

    Raises:
        EncoderError: The encoder does not take these images.
        TaskError: Images to be turned are not square.
    """
    height, width = data.x_SCHW.shape[-2:]
    if rotations and height != width:
        raise TaskError(f"rotations=True: images are {height}x{width}; load square ones with size=")
    mean, std = channel_statistics(data.x_SCHW) if statistics is None else statistics
    std = [value or 1.0 for value in std]
    num_turns, done = NUM_TURNS if rotations else 1, 0
    for turn in range(num_turns):
        for x_SCHW in data.x_SCHW.split(_BATCH):
            turned_SCHW = torch.rot90(x_SCHW, turn, (-2, -1))
            yield encoder(normalise(turned_SCHW, mean=mean, std=std).flatten(1)).numpy()
            done += len(x_SCHW)
            if on_progress is not None:
                on_progress(done, num_turns * len(data.y_S))


def feature_data(data: ImageData, features_SE: Tensor, *, rotations: bool) -> ImageData:
    """Returns features in the order of `encode` with their labels, names and columns."""
    num_turns = NUM_TURNS if rotations else 1
    turns_S = torch.arange(num_turns).repeat_interleave(len(data.y_S))
    names = [f"{name} turned by {90 * turn}" for turn in range(1, num_turns) for name in data.class_names]
    return dataclasses.replace(
        data,
        x_SCHW=features_SE[..., None, None],
        y_S=data.y_S.repeat(num_turns) + turns_S * len(data.class_names),
        class_names=(*data.class_names, *names),
        columns={name: tuple(values) * num_turns for name, values in data.columns.items()},
    )


def turned_classes(classes: Sequence[int], num_classes: int, *, rotations: bool) -> list[int]:
    """Returns these classes, then all of them for each quarter turn.

    Args:
        classes: Classes of the data.
        num_classes: Number of classes of the data, before any turn.
        rotations: Whether turned classes are added.
    """
    return [number + turn * num_classes for turn in range(NUM_TURNS if rotations else 1) for number in classes]


def _content(x: Tensor) -> str:
    return f"{tuple(x.shape)} {hashlib.sha256(np.ascontiguousarray(x.numpy()).data).hexdigest()}"


def _cached(encoder: FrozenEncoder, recipe: list, num: int, blocks: Iterator[np.ndarray]) -> Tensor:
    """Returns features `(S, E)` from the cache, else from the blocks, which are computed only then."""
    name = f"features-{hashlib.sha256(repr([encoder.fingerprint, *recipe]).encode()).hexdigest()[:32]}.npy"
    stored = load_bytes_array(name)
    if stored is None:
        first = next(blocks)
        as_bytes = (np.ascontiguousarray(block).view(np.uint8) for block in chain([first], blocks))
        try:
            stored = store_bytes_array(name, (num, first.shape[1] * _BYTES), as_bytes)
        except OSError as error:
            raise TaskError(
                f"features cannot be kept ({error}); free some disk space, or name another folder by {FOLDER}"
            ) from error
    return torch.from_numpy(stored.view(np.float32))
