"""A baseline that generates nothing: one network for all tasks, trained by the loss of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raywgen.generators import (
    DataSpec,
    Generated,
    GenerationRequest,
    Generator,
    GeneratorConfig,
    OptimizerConfig,
    StageConfig,
)
from raywgen.generators.common.task_loss_stage import TaskLossStage
from raywgen.generators.stage import Stage, StageLoss
from raywgen.weights import KeyedNoise, Layout, Normalizer, NormalizerTable, WeightBatch


@dataclass(kw_only=True)
class SharedNetworkConfig(GeneratorConfig):
    """Training of the network.

    Attributes:
        task_loss: The only stage. Its rate is in units of each tensor's spread over the corpus.
    """

    task_loss: StageConfig = field(
        default_factory=lambda: StageConfig(
            num_steps=300, batch_size=8, optimizer=OptimizerConfig(learning_rate=1.0, weight_decay=0.0)
        )
    )


class SharedNetwork(Generator[SharedNetworkConfig]):
    """One network of each layout, whatever the condition; it begins as the shared start, or as the mean of all."""

    Config = SharedNetworkConfig

    def __init__(self, config: SharedNetworkConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, normalizers, data)
        self.values = nn.ParameterDict(
            {key: nn.Parameter(_start(layout, normalizer)) for key, (layout, normalizer) in normalizers.items()}
        )

    def all_stages(self) -> list[Stage]:
        """Returns the task-loss stage alone."""
        return [SharedNetworkStage(self)]

    def network(self, layout: Layout) -> Tensor:
        """Returns the flat vector `(D,)`, differentiable."""
        return self.normalizer(layout).denormalise(self.values[layout.id].unsqueeze(0))[0]

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Returns the network, once for each condition."""
        values_BD = self.network(request.layout).expand(len(request.condition), -1)
        return Generated(values_BD=values_BD.clone(), log_prob_B=None)


def _start(layout: Layout, normalizer: Normalizer) -> Tensor:
    """Returns the values `(D,)`, as they are normalised, that a network begins with."""
    if normalizer.start_D is None:
        return torch.zeros(layout.num_values)
    return normalizer.normalise(normalizer.start_D.float().unsqueeze(0))[0].clone()


class SharedNetworkStage(TaskLossStage):
    """Trains the one network for all tasks."""

    def __init__(self, generator: SharedNetwork) -> None:
        super().__init__(generator.config.task_loss)
        self.generator = generator

    def written(self, batch: WeightBatch, noise: KeyedNoise) -> tuple[Tensor, StageLoss | None]:
        """Returns the network, once for each condition, `(B, D)`."""
        return self.generator.network(batch.layout).expand(len(batch), -1), None
