"""Tells drawings in dark ink on white paper from those in light ink on black paper.

An encoder that was trained on one polarity has never met the other, and its features of such images are worth little.

Shape legend: S samples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_MARGIN = 8  # Levels of 255: resizing and JPEG leave paper a little off its extreme.
_LEAST_SHARE = 0.25
# Photographs have means about the middle.
_LEAST_BLACK = 0.35


def paper(x_SCHW: Tensor) -> str | None:
    """Returns the colour of the paper, `black` or `white`, or None for images without one, such as photographs.

    Paper is the colour of at least a quarter of all pixels, and of at least twice as many as the opposite one.

    Args:
        x_SCHW: Pixels, uint8.
    """
    black = float((x_SCHW <= _MARGIN).float().mean())
    white = float((x_SCHW >= 255 - _MARGIN).float().mean())
    if max(black, white) < _LEAST_SHARE or max(black, white) < 2 * min(black, white):
        return None
    return "black" if black > white else "white"


def usual_paper(mean: Sequence[float]) -> str | None:
    """Returns the colour of the paper of data with this mean of each channel, or None where it could be either.

    Args:
        mean: Means of pixels from 0 to 1.
    """
    grey = sum(mean) / len(mean)
    if _LEAST_BLACK < grey < 1 - _LEAST_BLACK:
        return None
    return "black" if grey < 0.5 else "white"
