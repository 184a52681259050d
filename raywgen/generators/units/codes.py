"""Codes of the units along an axis, by which they become different from one another.

Shape letter beyond the legend in `raywgen.weights`: n units of an axis.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from raywgen.weights import KeyedNoise

_NUM_FREQUENCIES = 8
_NUM_DRAWN = 16
_SEED = 20
NUM_CODE = 2 * _NUM_FREQUENCIES + _NUM_DRAWN


@lru_cache(maxsize=512)
def unit_codes(num_units: int) -> Tensor:
    """Returns the code of each unit, float32 `(n, NUM_CODE)`; treat it as read-only.

    One half says where the unit lies among the others, by sines and cosines of `(j + 1/2) / n`; the other is drawn once
    for each number `j` and the same in networks of all widths. So axes of any length have codes, and neighbours differ.
    """
    unit_n = torch.arange(num_units)
    share_n1 = ((unit_n + 0.5) / num_units).unsqueeze(1)
    angle_nf = 2 * math.pi * share_n1 * 2.0 ** torch.arange(-1, _NUM_FREQUENCIES - 1)
    drawn = KeyedNoise(_SEED, unit_n).normal(_NUM_DRAWN)
    return torch.cat([math.sqrt(2) * angle_nf.sin(), math.sqrt(2) * angle_nf.cos(), drawn], dim=-1)
