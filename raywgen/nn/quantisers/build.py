"""Builds a quantiser from its config."""

from __future__ import annotations

from raywgen.nn.quantisers.config import QuantiserConfig
from raywgen.nn.quantisers.finite_scalar import FiniteScalarQuantiser
from raywgen.nn.quantisers.gumbel import Annealing, GumbelQuantiser
from raywgen.nn.quantisers.residual import ResidualQuantiser

AdditiveQuantiser = ResidualQuantiser | GumbelQuantiser | FiniteScalarQuantiser
"""A quantiser in which the code vectors of a vector's tokens add up to it."""


def build_quantiser(config: QuantiserConfig, width: int, num_steps: int = 1) -> AdditiveQuantiser:
    """Returns the quantiser of a config, for vectors of `width` values.

    Args:
        config: Kind and sizes of the quantiser.
        width: K, values of a vector.
        num_steps: Optimiser steps of the training, over which temperatures fall.
    """
    match config.kind:
        case "gumbel":
            return GumbelQuantiser(config.num_levels, config.num_codes, width, Annealing(steps=max(1, num_steps)))
        case "finite_scalar":
            return FiniteScalarQuantiser(config.levels_of_a_value(width), width // config.num_levels, width)
        case "residual":
            return ResidualQuantiser(
                config.num_levels,
                config.num_codes,
                width,
                config.decay,
                beam=config.beam,
                revive_below=config.revive_below,
            )
