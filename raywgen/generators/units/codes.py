"""Codes of the units along an axis, by which they become different from one another.

Shape letter beyond the legend in `raywgen.weights`: n units of an axis.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_NUM_FREQUENCIES = 4
NUM_CODE = 2 * _NUM_FREQUENCIES


@lru_cache(maxsize=512)
def unit_codes(num_units: int) -> Tensor:
    """Returns the code of each unit, float32 `(n, NUM_CODE)`; treat it as read-only.

    It says where the unit lies among the others, by sines and cosines of `(j + 1/2) / n`. Their frequencies are low, so
    that an axis of any width is a finer or coarser look at one and the same curve: sums over its units then come out
    alike, where codes that differ more from unit to unit would make another function of every width.
    """
    share_n1 = ((torch.arange(num_units) + 0.5) / num_units).unsqueeze(1)
    angle_nf = 2 * math.pi * share_n1 * 2.0 ** torch.arange(-1, _NUM_FREQUENCIES - 1)
    return math.sqrt(2) * torch.cat([angle_nf.sin(), angle_nf.cos()], dim=-1)
