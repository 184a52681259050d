"""A quantiser from its config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from raywgen.names import one_of
from raywgen.nn.quantisers.base import Quantiser
from raywgen.nn.quantisers.finite_scalar import FiniteScalarConfig, FiniteScalarQuantiser
from raywgen.nn.quantisers.gumbel import GumbelConfig, GumbelQuantiser
from raywgen.nn.quantisers.residual import ResidualConfig, ResidualQuantiser


@dataclass(kw_only=True)
class QuantiserConfig:
    """Which quantiser, and the settings of each.

    Attributes:
        kind: `residual` (with one level: plain vector quantisation), `gumbel` or `finite_scalar`.
        residual: Used where `kind=residual`.
        gumbel: Used where `kind=gumbel`.
        finite_scalar: Used where `kind=finite_scalar`.
    """

    kind: str = "residual"
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    gumbel: GumbelConfig = field(default_factory=GumbelConfig)
    finite_scalar: FiniteScalarConfig = field(default_factory=FiniteScalarConfig)

    def __post_init__(self) -> None:
        if self.kind not in QUANTISERS:
            raise ValueError(one_of("kind", self.kind, QUANTISERS))


QUANTISERS: dict[str, Callable[[QuantiserConfig, int], Quantiser]] = {
    "residual": lambda config, width: ResidualQuantiser.from_config(config.residual, width),
    "gumbel": lambda config, width: GumbelQuantiser(config.gumbel, width),
    "finite_scalar": lambda config, width: FiniteScalarQuantiser(config.finite_scalar, width),
}


def build_quantiser(config: QuantiserConfig, width: int) -> Quantiser:
    """The quantiser of a config, for vectors of `width` values.

    Raises:
        ValueError: The sizes do not fit each other; the message says which.
    """
    return QUANTISERS[config.kind](config, width)
