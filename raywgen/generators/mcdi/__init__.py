"""Mc-Di: meta-learned local-consistency diffusion."""

from raywgen.generators.mcdi.config import McDiConfig, McDiSampling
from raywgen.generators.mcdi.generator import McDi

__all__ = ["McDi", "McDiConfig", "McDiSampling"]
