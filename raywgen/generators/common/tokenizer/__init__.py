"""The tokeniser that turns chunks into tokens or latents, and the stage that trains it."""

from raywgen.generators.common.tokenizer.config import TokenizerConfig, VQVAEConfig
from raywgen.generators.common.tokenizer.stage import TokenizerStage
from raywgen.generators.common.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "TokenizerConfig", "TokenizerStage", "VQVAEConfig"]
