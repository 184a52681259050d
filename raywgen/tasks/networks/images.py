"""Brings inputs into the shape of images, flattened or not.

Shape legend: S samples, F features of a sample, C channels, H height, W width.
"""

from __future__ import annotations

import math

from torch import Tensor

from raywgen.tasks.base import TaskError


def as_images(x: Tensor, channels: int, side: int | None = None) -> Tensor:
    """Returns images `(S, C, H, W)` from images of that shape, or from their rows `(S, F)`, channels first.

    Args:
        x: Images, of any dtype, or square images flattened.
        channels: C.
        side: The only H and W that the network takes; None for any, which is then found from the number of values.

    Raises:
        TaskError: The inputs are no such images.
    """
    if x.dim() == 2:
        found = math.isqrt(x.shape[1] // channels)
        if x.shape[1] == channels * found**2 and side in (None, found):
            return x.unflatten(1, (channels, found, found))
    elif x.dim() == 4 and x.shape[1] == channels and (side is None or tuple(x.shape[2:]) == (side, side)):
        return x
    height, width, size = ("H", "W", f"{channels} x side x side") if side is None else (side, side, channels * side**2)
    raise TaskError(
        f"inputs of shape {tuple(x.shape)}: this network takes (S, {channels}, {height}, {width}), or the same "
        f"flattened to (S, {size}); resize the images, or set in_channels and image_size where the network has them"
    )
