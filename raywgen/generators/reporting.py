"""The rows and the weight code that a generator contributes to reports about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
