"""The figures of a tokeniser, as they are kept with a run.

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
        split: `training`, or `held out` for all that no training network is of: other trajectories, other tasks.
        num_networks: How many were measured.
        bits_per_value: Bits of all tokens over all values. Whatever a network is written by is a token, so biases,
            BatchNorm with its running statistics, padding and any scales are counted at the tokens' rate.
        values_per_token: Values over tokens.
        snr_db: Signal to noise of what is coded, the distance from the reference in units of each tensor's scale.
        snr_gap_db: How far that is below 6.02 dB per bit, the bound for independent Gaussian values of one scale. Below
            0 where values are easier than those, as differences from a shared start often are.
        codes_used: Part of the codes of each level that occur.
        code_perplexity: `2^H` of each level's codes.
        original_accuracy: Mean balanced test accuracy in [0, 1]; None where the tasks cannot be rebuilt.
        reconstructed_accuracy: The same, of the same networks decoded.
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
        codebook_values: Numbers of the codebooks, which no network pays for.
        decoder_values: Numbers of the decoder, likewise.
        normalizer_values: Numbers of all layouts' references, likewise: shared starts and scales.
        no_accuracy: Why there is no accuracy; empty where there is.
        splits: Those that the corpus holds.
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
