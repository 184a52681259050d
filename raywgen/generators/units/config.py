"""Settings of the generator of units."""

from __future__ import annotations

from dataclasses import dataclass, field

from raywgen.generators.settings import GeneratorConfig, OptimizerConfig, StageConfig
from raywgen.nn.batch_norm import Statistics


@dataclass(kw_only=True)
class UnitsConfig(GeneratorConfig):
    """Size and training of the generator.

    Attributes:
        width: H, numbers by which a unit is described.
        num_layers: Blocks that a unit's code and the task pass through.
        text_encoder: Encoder of the instruction: `words`, `bytes`, or `hf:NAME`.
        code_noise: Noise on the codes of units in training, in units of the codes; generation draws it times the
            temperature, so that candidates differ.
        num_references: M, inputs of training tasks that are remembered. With their predicted labels they stand beside
            the user's samples, and the layer of outputs is fitted to both; 0 remembers and fits nothing.
        statistics: Statistics of batch normalisation in the networks whose loss is taken: `stored` or `batch`.
        task_loss: The only stage.
    """

    width: int = 128
    num_layers: int = 1
    text_encoder: str = "words"
    code_noise: float = 0.05
    num_references: int = 512
    statistics: Statistics = "stored"
    task_loss: StageConfig = field(
        default_factory=lambda: StageConfig(
            num_steps=3000, optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=200)
        )
    )

    def __post_init__(self) -> None:
        if min(self.width, self.num_layers) < 1 or min(self.code_noise, self.num_references) < 0:
            raise ValueError(
                f"width={self.width}, num_layers={self.num_layers}, code_noise={self.code_noise}, "
                f"num_references={self.num_references}: the first two must be at least 1, the others at least 0"
            )
