"""A plain hypernetwork: weights straight from the condition, trained by the task's loss.

It is the baseline that a generator of tokens has to be judged against (Ha et al. 2017, "HyperNetworks"): it
sees the same conditions and the same task loss, but models no distribution and learns nothing from the corpus
beyond the shared start and the scale of each tensor.

Shape legend: B networks, M chunks, K values of a chunk, H width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raywgen.generators.common.task_loss import task_loss
from raywgen.generators.interface import (
    DataSpec,
    Generated,
    GenerationRequest,
    Generator,
    Stage,
    StageConfig,
    StageLoss,
    StageNeeds,
)
from raywgen.nn.batch_norm import Statistics
from raywgen.nn.conditions import ConditionEncoder, ConditionSummary, PositionEncoder
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer, NormalizerTable, WeightBatch
from raywgen.weights.chunks import from_chunks, num_position_features, position_features

_CHUNK_LENGTH = 16


@dataclass(kw_only=True)
class HypernetworkConfig:
    """Size and training of the hypernetwork.

    Attributes:
        width: H.
        statistics: Of batch normalisation in the networks whose loss is taken: `stored` or `batch`, as IGPG's.
        task_loss: Its only stage.
    """

    width: int = 128
    statistics: Statistics = "stored"
    task_loss: StageConfig = field(default_factory=lambda: StageConfig(num_steps=1000))


class Hypernetwork(Generator):
    """One pass from condition and places to all chunks."""

    method = "hypernetwork"
    Config = HypernetworkConfig

    def __init__(self, config: HypernetworkConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, normalizers, data)
        self.config: HypernetworkConfig
        H = config.width
        self.condition = ConditionEncoder(
            num_features=data.num_features,
            max_classes=data.max_classes,
            num_position_features=num_position_features(),
            width=H,
        )
        self.condition_summary = ConditionSummary(H)
        self.position = PositionEncoder(num_position_features(), H)
        self.body = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 2 * H), nn.GELU(), nn.Linear(2 * H, _CHUNK_LENGTH))

    def all_stages(self) -> list[Stage]:
        """The task-loss stage alone."""
        return [HypernetworkStage(self)]

    def values(self, condition: Condition, layout: Layout, normalizer: Normalizer) -> Tensor:
        """Flat vectors `(B, D)`, differentiable."""
        positions_MG = position_features(layout, _CHUNK_LENGTH)
        tokens_BTH = self.condition(condition.instructions, condition.samples_BSF, condition.labels_BS, positions_MG)
        chunks_BMK = self.body(self.condition_summary(tokens_BTH, self.position(positions_MG)))
        return normalizer.denormalise(from_chunks(chunks_BMK, layout.num_values))

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """The same network for the same condition, whatever the temperature."""
        self.resolve_sampling(request.sampling)
        normalizer = self.normalizer(request.layout, request.normalizer)
        values_BD = self.values(request.condition, request.layout, normalizer)
        return Generated(values_BD=values_BD, log_prob_B=None)


class HypernetworkStage(Stage):
    """Minimises the task's loss of the written networks on query samples."""

    name = "task_loss"

    def __init__(self, generator: Hypernetwork) -> None:
        super().__init__()
        self.generator = generator

    @property
    def config(self) -> StageConfig:
        """Returns the settings of the only stage."""
        return self.generator.config.task_loss

    @property
    def needs(self) -> StageNeeds:
        """Tasks, and whole networks to run."""
        return StageNeeds()

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Class-balanced cross-entropy on the query samples."""
        values_BD = self.generator.values(batch.condition, batch.layout, self.generator.normalizer(batch.layout))
        loss_B, accuracy_B = task_loss(values_BD, batch, statistics=self.generator.config.statistics)
        return StageLoss(loss=loss_B.mean(), metrics={"accuracy": accuracy_B.mean().detach()})
