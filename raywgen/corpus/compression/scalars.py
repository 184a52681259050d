"""Numbers beside the tokens: scales of a few bits on a logarithmic grid, and small tensors on an even one.

Shape letters beyond the legend in `raywgen.weights`: X values of a tensor, G row scales, I column scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BITS = 8
COLUMN_BITS = 4
END_BITS = 32
_STEPS_OF_AN_OCTAVE = 8
_SMALLEST_OCTAVE = -24
_STEPS_OF_A_COLUMN_OCTAVE = 4
_SMALLEST_COLUMN_OCTAVE = -3
_SMALLEST_VARIANCE = 1e-12


def encode_scales(scales_G: Tensor) -> Tensor:
    """Returns tokens int64 `(G,)` in `[0, 256)`: eighths of an octave from 2^-24 on, within 4.5 % of the scale."""
    octave_G = scales_G.double().clamp(min=2.0**-60).log2()
    token_G = torch.round((octave_G - _SMALLEST_OCTAVE) * _STEPS_OF_AN_OCTAVE).to(torch.int64)
    return token_G.clamp(0, (1 << SCALE_BITS) - 1)


def decode_scales(tokens_G: Tensor) -> Tensor:
    """Returns scales float32 `(G,)`, always positive."""
    return torch.exp2(tokens_G.double() / _STEPS_OF_AN_OCTAVE + _SMALLEST_OCTAVE).float()


def encode_even(values_X: Tensor, bits: int, is_variance: bool) -> tuple[Tensor, Tensor]:
    """Writes a small tensor on an even grid between its ends; variances on a logarithmic one, so they stay positive.

    Returns:
        Codes int64 `(X,)` in `[0, 2^bits)`, and middle and reach of the grid, bfloat16 `(2,)`.
    """
    value_X = values_X.float().clamp(min=_SMALLEST_VARIANCE).log() if is_variance else values_X.float()
    middle = ((value_X.min() + value_X.max()) / 2).to(torch.bfloat16)
    # bfloat16 rounds by at most 2^-8: the reach still holds both ends.
    reach = ((value_X - middle.float()).abs().max() * (1 + 2.0**-7)).to(torch.bfloat16)
    steps = (1 << bits) - 1
    position_X = ((value_X - middle.float()) / reach.float().clamp(min=1e-30) + 1) / 2
    return torch.round(position_X * steps).to(torch.int64).clamp(0, steps), torch.stack([middle, reach])


def decode_even(codes_X: Tensor, ends_2: Tensor, bits: int, is_variance: bool) -> Tensor:
    """Returns values float32 `(X,)`."""
    middle, reach = ends_2.float()
    value_X = middle + reach * (codes_X.float() * (2 / ((1 << bits) - 1)) - 1)
    return value_X.exp() if is_variance else value_X


def encode_columns(scales_I: Tensor) -> Tensor:
    """Returns tokens int64 `(I,)` in `[0, 16)`: quarters of an octave from 1/8 on."""
    octave_I = scales_I.clamp(min=2.0**-60).log2() - _SMALLEST_COLUMN_OCTAVE
    return torch.round(octave_I * _STEPS_OF_A_COLUMN_OCTAVE).long().clamp(0, (1 << COLUMN_BITS) - 1)


def decode_columns(tokens_I: Tensor) -> Tensor:
    """Returns column scales float32 `(I,)`, always positive."""
    return torch.exp2(tokens_I.double() / _STEPS_OF_A_COLUMN_OCTAVE + _SMALLEST_COLUMN_OCTAVE).float()
