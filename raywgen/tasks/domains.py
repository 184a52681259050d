"""Domains: transformations of the same images, by name, for tasks of domain generalisation.

`plain`, `invert`, `rotate-DEGREES`, `contrast-FACTOR`, `scale-FACTOR`.

Shape legend: S samples, C channels, H height, W width; h and w a smaller height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from raywgen.names import nearest
from raywgen.tasks.base import TaskError


def rotate(x_SCHW: Tensor, degrees: float) -> Tensor:
    """Turns counter-clockwise about the centre; pixels from outside the image repeat the nearest edge pixel.

    Square images turn by multiples of 90 degrees exactly, others by bilinear interpolation.
    """
    height, width = x_SCHW.shape[-2:]
    turns, rest = divmod(degrees, 90)
    if rest == 0 and (height == width or turns % 2 == 0):
        return torch.rot90(x_SCHW, int(turns), (-2, -1))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The grid's coordinates run from -1 to 1 on both axes, so an oblong image needs its aspect put in.
    matrix = x_SCHW.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    grid = functional.affine_grid(matrix.expand(len(x_SCHW), 2, 3), list(x_SCHW.shape), align_corners=False)
    # Edge pixels rather than zeros: the paper is white in some data and black in others.
    return functional.grid_sample(x_SCHW, grid, padding_mode="border", align_corners=False)


def invert(x_SCHW: Tensor) -> Tensor:
    """Inverts pixels: `1 - x`."""
    return 1 - x_SCHW


def contrast(x_SCHW: Tensor, factor: float) -> Tensor:
    """`mean + factor * (x - mean)` about each image's own mean, kept within [0, 1]."""
    mean_S111 = x_SCHW.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean_S111, x_SCHW, factor).clamp_(0, 1)


def scale(x_SCHW: Tensor, factor: float) -> Tensor:
    """Zooms about the centre at the same image size: above 1 crops, below 1 pads with the nearest edge pixel."""
    height, width = x_SCHW.shape[-2:]
    if factor >= 1:
        h, w = max(1, round(height / factor)), max(1, round(width / factor))
        top, left = (height - h) // 2, (width - w) // 2
        return _resize(x_SCHW[..., top : top + h, left : left + w], height, width)
    h, w = max(1, round(height * factor)), max(1, round(width * factor))
    top, left = (height - h) // 2, (width - w) // 2
    margins = (left, width - w - left, top, height - h - top)
    return functional.pad(_resize(x_SCHW, h, w), margins, mode="replicate")


def _resize(x_SCHW: Tensor, height: int, width: int) -> Tensor:
    resized = functional.interpolate(x_SCHW, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp_(0, 1)


@dataclass(frozen=True, slots=True)
class Domain:
    """A kind of domain.

    Attributes:
        transform: Takes images and, where there is an `example`, the number in the domain's name.
        example: A name with a number; empty where the kind takes none.
        above: Lower bound of the number, exclusive.
    """

    transform: Callable[..., Tensor]
    example: str = ""
    above: float = -math.inf


DOMAINS: dict[str, Domain] = {
    "plain": Domain(torch.clone),
    "invert": Domain(invert),
    "rotate": Domain(rotate, "rotate-30"),
    "contrast": Domain(contrast, "contrast-0.5", above=0),
    "scale": Domain(scale, "scale-0.75", above=0),
}


def apply_domain(x_SCHW: Tensor, name: str) -> Tensor:
    """Returns images as they look in a domain.

    Args:
        x_SCHW: Pixels in [0, 1], floating point `(S, C, H, W)`; left as they are.
        name: Name, such as `plain`, `invert`, `rotate-30`, `rotate--15` (clockwise), `contrast-0.5` or `scale-0.75`.

    Returns:
        New pixels in [0, 1] of the same shape and dtype.

    Raises:
        TaskError: There is no such domain, its number is missing, superfluous or out of range, or the images are not
            as said.
    """
    domain, arguments = _parse(name)
    shape = tuple(x_SCHW.shape)
    if not x_SCHW.is_floating_point() or x_SCHW.dim() != 4 or not x_SCHW.numel():
        raise TaskError(f"images {shape} of {x_SCHW.dtype}: give floating point (S, C, H, W); divide uint8 by 255")
    low, high = (float(end) for end in torch.aminmax(x_SCHW))
    if not 0 <= low <= high <= 1:
        raise TaskError(f"pixels from {low} to {high}: give pixels in [0, 1], and normalise only afterwards")
    return domain.transform(x_SCHW, *arguments)


def _parse(name: str) -> tuple[Domain, tuple[float, ...]]:
    kind, dash, number = name.partition("-")
    if kind not in DOMAINS:
        near = nearest(kind, DOMAINS)
        raise TaskError(f"unknown domain '{name}'; did you mean '{DOMAINS[near].example or near}'?")
    domain = DOMAINS[kind]
    if not domain.example:
        if dash:
            raise TaskError(f"domain '{name}': '{kind}' takes no number; write '{kind}'")
        return domain, ()
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > domain.above):
        limit = f" above {domain.above:g}" if domain.above > -math.inf else ""
        raise TaskError(f"domain '{name}' needs a number{limit}; write for instance '{domain.example}'")
    return domain, (value,)
