"""The figures of a tokeniser, as a run keeps them.

`tokenizer.json` in a run folder and `tokenizer` in `evaluation.json` are the fields of `TokenizerReport`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

SPLITS = ("training", "held out")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """Networks of one split through the tokeniser and back.

    Attributes:
        split: `training`, or `held out` for networks of other trajectories and tasks than those of training.
        num_networks: Number of networks that were measured.
        bits_per_value: Bits of all tokens over all values. Biases, BatchNorm with its running statistics, padding and
            any scales are written by tokens as well and counted at the same rate.
        values_per_token: Number of values over number of tokens.
        snr_db: Signal-to-noise ratio of the normalised values, decibels.
        snr_gap_db: Distance of `snr_db` below 6.02 dB per bit, the bound for independent Gaussian values of one scale.
            Below 0 where values are easier than those, as differences from a shared start often are.
        codes_used: Share of the codes of each level that occur.
        code_perplexity: `2^H` of each level's codes.
        original_accuracy: Mean balanced test accuracy in [0, 1]; None where the tasks cannot be rebuilt.
        reconstructed_accuracy: The same of the networks decoded from their tokens.
    """

    split: str
    num_networks: int
    bits_per_value: float
    values_per_token: float
    snr_db: float
    snr_gap_db: float
    codes_used: tuple[float, ...]
    code_perplexity: tuple[float, ...]
    original_accuracy: float | None
    reconstructed_accuracy: float | None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split '{self.split}' of the tokeniser is not one of {', '.join(SPLITS)}")
        numbers = (self.bits_per_value, self.values_per_token, self.snr_db, self.snr_gap_db)
        if not all(math.isfinite(number) for number in (*numbers, *self.codes_used, *self.code_perplexity)):
            raise ValueError("a figure of the tokeniser is not finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerReport:
    """A tokeniser on the networks of a corpus.

    Attributes:
        coder: Kind of encoder and decoder.
        quantiser: Kind of quantiser.
        num_levels: Tokens of a chunk.
        num_codes: Codes of a token.
        codebook_values: Number of values in the codebooks, which all networks share and no bits count.
        decoder_values: Number of values in the decoder, likewise.
        normalizer_values: Number of values in the normalisers of all layouts (shared starts and scales), likewise.
        no_accuracy: Reason why accuracies are missing; empty where they are not.
        splits: Figures of the splits that the corpus holds.
    """

    coder: str
    quantiser: str
    num_levels: int
    num_codes: int
    codebook_values: int
    decoder_values: int
    normalizer_values: int
    no_accuracy: str
    splits: tuple[SplitReport, ...]

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("the tokeniser was measured on nothing: the corpus holds no network of its layouts")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`.

        Raises:
            TypeError, KeyError, ValueError: A part is missing, unknown or no figure.
        """
        splits = tuple(
            SplitReport(
                **{
                    **row,
                    "codes_used": tuple(row["codes_used"]),
                    "code_perplexity": tuple(row["code_perplexity"]),
                }
            )
            for row in content["splits"]
        )
        return cls(**{**content, "splits": splits})
