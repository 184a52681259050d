"""Config of IGPG; sizes are chosen by measurement on two cores, see the README."""

from __future__ import annotations

from dataclasses import dataclass, field

from raywgen.generators.interface import StageConfig


@dataclass(kw_only=True)
class TokenizerConfig(StageConfig):
    """The VQ-VAE.

    Attributes:
        chunk_length: K, values of a chunk, one position of the prior.
        num_levels: L, residual tokens of a chunk.
        num_codes: V, codes of a level; bits per value = L * log2(V) / K.
        width: Hidden width of encoder and decoder.
        commitment: Weight of the commitment loss (gamma of the paper's objective).
        codebook_decay: Weight of the past in the codebooks' moving averages.
    """

    num_steps: int = 150
    batch_size: int = 64
    learning_rate: float = 2e-3
    chunk_length: int = 16
    num_levels: int = 8
    num_codes: int = 256
    width: int = 128
    commitment: float = 0.25
    codebook_decay: float = 0.98

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        if self.chunk_length < 1 or self.num_levels < 1 or self.num_codes < 2:
            raise ValueError("chunk_length and num_levels must be at least 1, num_codes at least 2")


@dataclass(kw_only=True)
class PriorConfig(StageConfig):
    """The causal transformer.

    Attributes:
        width: H.
        num_layers: Blocks.
        num_heads: Attention heads; must divide `width` into even parts.
        dropout: On the residual branches; the one source of noise that the number of workers changes.
    """

    num_steps: int = 250
    batch_size: int = 32
    learning_rate: float = 3e-3
    width: int = 128
    num_layers: int = 3
    num_heads: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 * num_heads={2 * self.num_heads}")


@dataclass(kw_only=True)
class FunctionalConfig(StageConfig):
    """Training through soft tokens by the task's own loss; `num_steps=0` switches it off.

    Attributes:
        temperature: Of the rollouts whose prefix the soft tokens continue.
        likelihood: Weight of the token likelihood that is kept beside the task's loss.
        anchor: Weight of the mean squared distance to the corpus' network, in units of each tensor's scale.
    """

    num_steps: int = 450
    batch_size: int = 32
    temperature: float = 0.5
    likelihood: float = 0.1
    anchor: float = 0.1


@dataclass(kw_only=True)
class IGPGConfig:
    """All of IGPG: tokeniser, prior, functional stage."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    functional: FunctionalConfig = field(default_factory=FunctionalConfig)
