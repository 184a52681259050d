"""Random changes of images, keyed so that any step can be made again.

Shape letters beyond the legend in `raywgen.weights`: T images, C channels, H height, W width.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from torch.nn import functional

from raywgen.tasks.base import TaskError
from raywgen.weights import KeyedNoise

_STEP_STRIDE = 1 << 20
_FLIP, _SHIFT = "flip", re.compile(r"shift-(\d+)")


def check_augment(kind: str) -> None:
    """Refuses a kind of change that does not exist.

    Args:
        kind: `flip`, `shift-K`, both joined by `+`, or empty for no change.

    Raises:
        ValueError: The kind is unknown.
    """
    for part in kind.split("+") if kind else ():
        if part != _FLIP and not _SHIFT.fullmatch(part):
            raise ValueError(f"augment={kind}: unknown kind '{part}'; give flip, shift-K, or both joined by +")


def augment(x: Tensor, kind: str, seed: int, step: int) -> Tensor:
    """Changes a batch of square images; what comes in from outside is 0.

    Args:
        x: `(T, C * H * W)` of one or three channels, or `(T, C, H, W)`.
        kind: `flip`, `shift-K`, both joined by `+`, or empty for no change.
        seed: Seed of the run.
        step: Step of the run.

    Raises:
        ValueError: The kind is unknown.
        TaskError: Flattened samples are no square images.
    """
    if not kind:
        return x
    check_augment(kind)
    images_TCHW = _square(x, kind)
    generator = torch.Generator().manual_seed(seed * _STEP_STRIDE + step)
    num = len(x)
    for part in kind.split("+"):
        if part == _FLIP:
            images_TCHW = _flipped(images_TCHW, torch.rand(num, generator=generator) < 0.5)
            continue
        reach = int(part.removeprefix("shift-"))
        images_TCHW = _shifted(images_TCHW, reach, torch.randint(2 * reach + 1, (num, 2), generator=generator))
    return images_TCHW.reshape(x.shape)


def augment_each(x_BSF: Tensor, kind: str, noise: KeyedNoise) -> Tensor:
    """Changes the images of B networks, each by noise of its own, so that a batch may be divided in any way.

    What comes in from outside is an image's background.

    Args:
        x_BSF: Images of one or three channels, flattened.
        kind: `flip`, `shift-K`, both joined by `+`, or empty for no change.
        noise: B rows of keyed noise.

    Raises:
        ValueError: The kind is unknown.
        TaskError: Samples are no square images.
    """
    if not kind:
        return x_BSF
    check_augment(kind)
    images_TCHW = _square(x_BSF.flatten(0, 1), kind)
    background_TC11 = background(images_TCHW)
    images_TCHW = images_TCHW - background_TC11
    num = x_BSF.shape[1]
    for part in kind.split("+"):
        if part == _FLIP:
            images_TCHW = _flipped(images_TCHW, noise.uniform(num).flatten() < 0.5)
            continue
        reach = int(part.removeprefix("shift-"))
        images_TCHW = _shifted(images_TCHW, reach, noise.integers(2 * reach + 1, num, 2).flatten(0, 1))
    return (images_TCHW + background_TC11).reshape(x_BSF.shape)


def background(images_TCHW: Tensor) -> Tensor:
    """Returns the background `(T, C, 1, 1)` of images: their commonest value, which is not 0 in standardised ones."""
    return images_TCHW.flatten(2).median(dim=2).values[..., None, None]


def _square(x: Tensor, kind: str) -> Tensor:
    """Returns `(T, C, H, W)`; no number of values is that of a grey and of a coloured square at once."""
    num_values = x[0].numel()
    for channels in (1, 3) if x.ndim == 2 else (x.shape[1],):
        side = math.isqrt(num_values // channels)
        if channels * side * side == num_values:
            return x.reshape(len(x), channels, side, side)
    raise TaskError(f"augment={kind}: samples of {num_values} values are no square images; leave it out")


def _flipped(images_TCHW: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T.view(-1, 1, 1, 1), images_TCHW.flip(-1), images_TCHW)


def _shifted(images_TCHW: Tensor, reach: int, offset_T2: Tensor) -> Tensor:
    """Moves each image by `offset_T2 - reach` rows and columns; what comes in is 0."""
    side = images_TCHW.shape[-1]
    padded = functional.pad(images_TCHW, [reach] * 4)
    span = torch.arange(side)
    rows = (offset_T2[:, :1] + span).view(-1, 1, side, 1)
    columns = (offset_T2[:, 1:] + span).view(-1, 1, 1, side)
    samples = torch.arange(len(images_TCHW)).view(-1, 1, 1, 1)
    channels = torch.arange(images_TCHW.shape[1]).view(1, -1, 1, 1)
    return padded[samples, channels, rows, columns]
