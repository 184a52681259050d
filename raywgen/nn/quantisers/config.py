"""The settings of all quantisers, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QuantiserKind = Literal["residual", "gumbel", "finite_scalar"]
_MAX_SCALAR_CODES = 1 << 24
_MAX_SCALAR_LEVELS = 1 << 12


@dataclass(kw_only=True)
class QuantiserConfig:
    """The settings of a quantiser of vectors.

    Attributes:
        kind: `residual` (each token codes the remainder of those before it; one level is plain vector quantisation),
            `gumbel` (IGPG's; each token codes its part of a vector) or `finite_scalar` (likewise, without codebooks).
        num_levels: L, tokens of a vector.
        num_codes: V, codes of a token; bits per value = L * log2(V) / K.
        decay: Weight of the past in the moving averages of the codebooks of `residual`.
        beam: Number of partial sums that the encoding of `residual` keeps; 1 is greedy.
        revive_below: A code of `residual` that is used less than this share of the mean is put on a vector of the
            batch; 0 lets codes die.
    """

    kind: QuantiserKind = "residual"
    num_levels: int = 8
    num_codes: int = 256
    decay: float = 0.98
    beam: int = 1
    revive_below: float = 0.0

    def __post_init__(self) -> None:
        if self.num_levels < 1 or self.num_codes < 2:
            raise ValueError(f"num_levels={self.num_levels}, num_codes={self.num_codes}: give at least 1 and 2")
        if self.beam < 1 or not 0 <= self.revive_below < 1:
            raise ValueError(f"beam={self.beam}, revive_below={self.revive_below}: give at least 1, and 0 to below 1")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: give a share from 0 to below 1")

    def check_width(self, width: int, name: str) -> None:
        """Checks that the sizes fit vectors of `width` values.

        Args:
            width: K, values of a vector.
            name: Name of the setting that holds K, for the message.

        Raises:
            ValueError: A size does not fit; the message names it.
        """
        if self.kind != "residual" and width % self.num_levels:
            raise ValueError(f"num_levels={self.num_levels}: must divide {name}={width}")
        if self.kind == "finite_scalar":
            values = width // self.num_levels
            if self.num_codes > _MAX_SCALAR_CODES or self.levels_of_a_value(width) > _MAX_SCALAR_LEVELS:
                raise ValueError(
                    f"num_codes={self.num_codes}: finite_scalar takes at most {_MAX_SCALAR_CODES} codes, and "
                    f"{_MAX_SCALAR_LEVELS} levels of a value"
                )
            fitting = self.levels_of_a_value(width) ** values
            if fitting != self.num_codes:
                raise ValueError(
                    f"num_codes={self.num_codes}: {values} values a token ask for a whole number to the power of "
                    f"{values}, such as {fitting}"
                )

    def levels_of_a_value(self, width: int) -> int:
        """Returns the levels of each value that `finite_scalar` rounds to, for vectors of `width` values."""
        return max(2, round(self.num_codes ** (1 / (width // self.num_levels))))
