"""Quantisers behind one call signature: vectors to tokens and back; one file each."""

from raywgen.nn.quantisers.base import AllReduce, Gumbel, Quantised, Quantiser
from raywgen.nn.quantisers.build import QUANTISERS, QuantiserConfig, build_quantiser
from raywgen.nn.quantisers.finite_scalar import FiniteScalarConfig, FiniteScalarQuantiser
from raywgen.nn.quantisers.gumbel import GumbelConfig, GumbelQuantiser
from raywgen.nn.quantisers.kmeans import nearest_code
from raywgen.nn.quantisers.residual import ResidualConfig, ResidualQuantiser
from raywgen.nn.quantisers.trellis import TrellisConfig, TrellisQuantiser

__all__ = [
    "QUANTISERS",
    "AllReduce",
    "FiniteScalarConfig",
    "FiniteScalarQuantiser",
    "Gumbel",
    "GumbelConfig",
    "GumbelQuantiser",
    "Quantised",
    "Quantiser",
    "QuantiserConfig",
    "ResidualConfig",
    "ResidualQuantiser",
    "TrellisConfig",
    "TrellisQuantiser",
    "build_quantiser",
    "nearest_code",
]
