"""Quantisers behind one call signature: vectors to tokens and back; one file each."""

from raywgen.nn.quantisers.base import AllReduce, Gumbel, Quantised, Quantiser
from raywgen.nn.quantisers.build import AdditiveQuantiser, build_quantiser
from raywgen.nn.quantisers.config import QuantiserConfig, QuantiserKind
from raywgen.nn.quantisers.finite_scalar import FiniteScalarQuantiser
from raywgen.nn.quantisers.gumbel import Annealing, GumbelQuantiser
from raywgen.nn.quantisers.kmeans import nearest_code
from raywgen.nn.quantisers.residual import ResidualQuantiser
from raywgen.nn.quantisers.trellis import TrellisConfig, TrellisQuantiser

__all__ = [
    "AdditiveQuantiser",
    "AllReduce",
    "Annealing",
    "FiniteScalarQuantiser",
    "Gumbel",
    "GumbelQuantiser",
    "Quantised",
    "Quantiser",
    "QuantiserConfig",
    "QuantiserKind",
    "ResidualQuantiser",
    "TrellisConfig",
    "TrellisQuantiser",
    "build_quantiser",
    "nearest_code",
]
