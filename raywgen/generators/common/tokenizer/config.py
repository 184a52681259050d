"""Config of the tokeniser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from raywgen.generators.settings import OptimizerConfig, StageConfig
from raywgen.nn.coders import CoderKind, check_coder
from raywgen.nn.quantisers import QuantiserConfig

Scales = Literal["normalizer", "tensor", "filter"]


@dataclass(kw_only=True)
class VQVAEConfig(StageConfig):
    """The VQ-VAE, and the stage that trains it.

    Attributes:
        chunk_length: K, values of a chunk, one position of the prior.
        quantiser: The quantiser of chunks.
        width: Hidden width of encoder and decoder.
        commitment: Weight of the commitment loss (gamma of the paper's objective).
        coder: Encoder and decoder: `mlp` (each chunk on its own), `conv` (each chunk folded into an image, as in the
            paper) or `transformer` (chunks of a block see each other).
        coder_layers: Residual blocks of `conv`, layers of `transformer`.
        context: Chunks of a block, of `transformer`; tokens of a chunk follow from its whole block.
        output_loss_weight: Weight of `output_loss`, the KL from the outputs of a network to those of its
            reconstruction on the task's samples; 0 switches it off.
        window: Most chunks of a network that a step of its training sees; of longer ones a random window of whole
            blocks. 0 for whole networks, which `output_loss_weight` always takes. What is encoded later does not
            depend on it.
    """

    num_steps: int = 150
    batch_size: int = 64
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-3))
    chunk_length: int = 16
    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)
    width: int = 128
    commitment: float = 0.25
    coder: CoderKind = "mlp"
    coder_layers: int = 1
    context: int = 32
    output_loss_weight: float = 0.0
    window: int = 1024

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        check_coder(self.coder, self.width, self.coder_layers, self.context)
        if self.output_loss_weight < 0:
            raise ValueError(f"output_loss_weight={self.output_loss_weight}: give a weight of at least 0")
        if self.chunk_length < 1:
            raise ValueError(f"chunk_length={self.chunk_length}: give at least 1")
        if self.window < 0:
            raise ValueError(f"window={self.window}: give a number of chunks, or 0 for whole networks")
        self.quantiser.check_width(self.chunk_length, "chunk_length")


@dataclass(kw_only=True)
class TokenizerConfig(VQVAEConfig):
    """The VQ-VAE as a tokeniser, whose tokens may hold the scales of weights too.

    Attributes:
        scales: Source of the scales of weights: `normalizer` (one for each tensor, measured over the corpus and kept
            beside the tokens, layout by layout), or tokens that hold each network's own scales, one for each `tensor`
            or for each `filter`.
    """

    scales: Scales = "normalizer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes_scales and self.coder == "transformer":
            raise ValueError(
                "coder=transformer: scales are coded before the chunks that it would see beside them; give coder=mlp "
                "or conv, or scales=normalizer"
            )

    @property
    def codes_scales(self) -> bool:
        """Whether scales travel as tokens."""
        return self.scales != "normalizer"
