"""The rows and the weight code that a generator contributes to reports about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from raywgen.weights import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """A row of the ladder for the generator as it was after one of its stages.

    Attributes:
        stage: Name of the stage; the run saved the generator when it ended.
        row: Name of the row, and so of its figures.
        label: Short title of the row.
        help: A sentence that explains the row.
    """

    stage: str
    row: str
    label: str
    help: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCode:
    """A discrete code of weights.

    Attributes:
        coder: Kind of encoder and decoder.
        quantiser: Kind of quantiser.
        num_levels: Tokens of a chunk.
        num_codes: Codes that a token can take.
        num_codebook_values: Numbers in the codebooks.
        num_decoder_values: Numbers in the decoder.
        encode: Takes flat vectors `(B, D)` and their layout, and returns codes `(B, W, L)`.
        real_tokens: Takes a layout, and marks the tokens that carry values of it, bool `(W, L)`.
    """

    coder: str
    quantiser: str
    num_levels: int
    num_codes: int
    num_codebook_values: int
    num_decoder_values: int
    encode: Callable[[Tensor, Layout], Tensor]
    real_tokens: Callable[[Layout], Tensor]


@dataclass(frozen=True, slots=True)
class Kept:
    """The quality that networks keep when they are written as tokens.

    Attributes:
        bits_per_value: Bits of the tokens over the values.
        snr_db: Signal-to-noise ratio in decibels, in units of each tensor's scale.
        points_lost: Points of accuracy lost.
    """

    bits_per_value: float
    snr_db: float
    points_lost: float


KEPT = (
    Kept(1.0, 5.5, 44.4),
    Kept(2.0, 9.9, 11.3),
    Kept(3.0, 14.2, 3.7),
    Kept(4.0, 18.4, 1.3),
    Kept(6.0, 26.1, 0.2),
    Kept(8.0, 32.8, 0.0),
)
"""Means of three published ResNets of CIFAR-10 (20, 32 and 44 layers), by the benchmark `quality`.

The tokeniser has chunks of 16 values and levels of 256 codes, and statistics of batch normalisation are matched on
unlabelled images.
"""


def kept_at(bits_per_value: float) -> Kept | None:
    """Returns what networks keep at some bits, between the two nearest of `KEPT`; None outside of them.

    Padding, which adds a little to the bits of a small network, may take it a hundredth beyond the last one.
    """
    most = KEPT[-1].bits_per_value
    bits_per_value = most if most < bits_per_value <= 1.01 * most else bits_per_value
    for below, above in pairwise(KEPT):
        if below.bits_per_value <= bits_per_value <= above.bits_per_value:
            share = (bits_per_value - below.bits_per_value) / (above.bits_per_value - below.bits_per_value)
            snr_db = (1 - share) * below.snr_db + share * above.snr_db
            points_lost = (1 - share) * below.points_lost + share * above.points_lost
            return Kept(bits_per_value, snr_db, points_lost)
    return None
