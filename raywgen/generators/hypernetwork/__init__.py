"""A plain hypernetwork: it maps the condition to weights in one pass and is trained by the task's loss.

It is the baseline for a generator of tokens (Ha et al. 2017, "HyperNetworks"): it has the same conditions and the same
task loss, but models no distribution, and learns nothing from the corpus beyond the shared start and the scale of each
tensor.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raywgen.generators.common.dropped import with_dropped_parts
from raywgen.generators.common.task_loss_stage import TaskLossStage
from raywgen.generators.interface import DataSpec, Generated, GenerationRequest, Generator
from raywgen.generators.settings import GeneratorConfig, StageConfig, check_condition_dropout
from raywgen.generators.stage import Stage, StageLoss
from raywgen.nn.batch_norm import Statistics
from raywgen.nn.conditions import ConditionEncoder, ConditionSummary, PositionEncoder
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer, NormalizerTable, WeightBatch
from raywgen.weights.chunks import from_chunks, num_position_features, position_features

_CHUNK_LENGTH = 16


@dataclass(kw_only=True)
class HypernetworkConfig(GeneratorConfig):
    """Size and training of the hypernetwork.

    Attributes:
        width: H.
        condition_dropout: Share of networks trained without a part of their condition: instruction, samples and both in
            equal parts. Writing from instruction or samples alone needs it above 0.
        from_base: Whether every network is the corpus' base when training begins, its shared start or its mean, and not
            random values about it.
        statistics: Statistics of batch normalisation in the networks whose loss is taken: `stored` or `batch`.
        task_loss: The only stage.
    """

    width: int = 128
    condition_dropout: float = 0.0
    from_base: bool = False
    statistics: Statistics = "stored"
    task_loss: StageConfig = field(default_factory=lambda: StageConfig(num_steps=1000))

    def __post_init__(self) -> None:
        check_condition_dropout(self.condition_dropout)


class Hypernetwork(Generator[HypernetworkConfig]):
    """Maps condition and position features to all chunks in one pass."""

    method = "hypernetwork"
    Config = HypernetworkConfig

    def __init__(self, config: HypernetworkConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, normalizers, data)
        H = config.width
        self.condition = ConditionEncoder(
            num_features=data.num_features,
            max_classes=data.max_classes,
            num_position_features=num_position_features(),
            width=H,
            can_drop=config.condition_dropout > 0,
        )
        self.condition_summary = ConditionSummary(H)
        self.position = PositionEncoder(num_position_features(), H)
        first, last = nn.Linear(H, 2 * H), nn.Linear(2 * H, _CHUNK_LENGTH)
        self.body = nn.Sequential(nn.LayerNorm(H), first, nn.GELU(), last)
        if config.from_base:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def reads_parts(self) -> bool:
        """Whether it was trained without parts of its condition."""
        return self.condition.dropped is not None

    def all_stages(self) -> list[Stage]:
        """Returns the task-loss stage alone."""
        return [HypernetworkStage(self)]

    def values(self, condition: Condition, layout: Layout, normalizer: Normalizer) -> Tensor:
        """Returns flat vectors `(B, D)`, differentiable in all parameters."""
        positions_MG = position_features(layout, _CHUNK_LENGTH, self.device)
        mean_G = positions_MG.mean(dim=0)
        tokens_BTH = self.condition(
            condition.instructions, condition.samples_BSF, condition.labels_BS, mean_G, condition.is_dropped_B2
        )
        chunks_BMK = self.body(self.condition_summary(tokens_BTH, self.position(positions_MG)))
        return normalizer.denormalise(from_chunks(chunks_BMK, layout.num_values))

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Writes networks; the same condition gives the same network, whatever the temperature."""
        self.resolve_sampling(request.sampling)
        normalizer = self.normalizer(request.layout, request.normalizer)
        values_BD = self.values(request.condition, request.layout, normalizer)
        return Generated(values_BD=values_BD, log_prob_B=None)


class HypernetworkStage(TaskLossStage):
    """Trains the hypernetwork, a share of the networks without a part of their condition."""

    def __init__(self, generator: Hypernetwork) -> None:
        super().__init__(generator.config.task_loss, generator.config.statistics)
        self.generator = generator

    @property
    def bytes_per_value(self) -> float:
        """Ten numbers are kept for each hidden unit of a chunk, as measured."""
        return super().bytes_per_value + 4 * 10 * self.generator.config.width / _CHUNK_LENGTH

    def written(self, batch: WeightBatch, noise: KeyedNoise) -> tuple[Tensor, StageLoss | None]:
        """Returns flat vectors `(B, D)`, differentiable in all parameters."""
        share = self.generator.config.condition_dropout
        condition = with_dropped_parts(batch.condition, noise, share, self.training)
        return self.generator.values(condition, batch.layout, self.generator.normalizer(batch.layout)), None
