"""IGPG: a VQ-VAE turns weights into tokens; a causal transformer writes tokens, given task, data and layout."""

from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg.config import IGPGConfig, IGPGTaskLossConfig, PriorConfig, SamplingConfig
from raywgen.generators.igpg.generator import IGPG

__all__ = ["IGPG", "IGPGConfig", "IGPGTaskLossConfig", "PriorConfig", "SamplingConfig", "TokenizerConfig"]
