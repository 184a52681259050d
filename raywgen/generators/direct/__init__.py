"""The baseline without diffusion: Mc-Di's network maps the support set to weights in one pass.

It has two stages, either of which may be switched off: **regression** to the stored weights by mean squared error, and
the **task-loss** stage. With the second alone it is a hypernetwork (Ha et al. 2017). Its size, condition and data are
those of Mc-Di's denoiser, so the chain is the only difference between the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raywgen.generators.common.denoisers import Denoiser, build_denoiser
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.support_set import SupportSetGenerator
from raywgen.generators.common.task_loss import task_loss
from raywgen.generators.interface import (
    DataSpec,
    Generated,
    GenerationRequest,
    GeneratorConfig,
    Stage,
    StageConfig,
    StageLoss,
    StageNeeds,
)
from raywgen.weights import Condition, KeyedNoise, Layout, NormalizerTable, WeightBatch


@dataclass(kw_only=True)
class DirectConfig(GeneratorConfig):
    """The network, and the stages that train it.

    Attributes:
        network: Kind and sizes of the network, as for Mc-Di's denoiser.
        regression: The stage that trains it towards the stored weights.
        task_loss: The stage that trains it by the task's loss.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    regression: StageConfig = field(default_factory=lambda: StageConfig(num_steps=1000, batch_size=64))
    task_loss: StageConfig = field(default_factory=lambda: StageConfig(num_steps=0, batch_size=64))


class Direct(SupportSetGenerator[DirectConfig]):
    """Maps a support set to weights in one pass."""

    method = "direct"
    Config = DirectConfig

    def __init__(self, config: DirectConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, config.network, normalizers, data)
        self.map = build_denoiser(config.network, self.normalizers, data)

    @property
    def network(self) -> Denoiser:
        """Returns the map from support sets to weights."""
        return self.map

    def all_stages(self) -> list[Stage]:
        """Returns the regression stage and the task-loss stage."""
        return [
            RegressionStage(self.config, self.map, self.normalizers),
            DirectTaskLossStage(self.config, self.map, self.normalizers),
        ]

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Writes networks; the same support set gives the same network, whatever the temperature."""
        self.resolve_sampling(request.sampling)
        condition, layout = request.condition, request.layout
        normalised_BD = self.map.decode(_states(self.map, condition, layout), condition, layout)
        return Generated(
            values_BD=self.normalizer(layout, request.normalizer).denormalise(normalised_BD), log_prob_B=None
        )


class _DirectStage(Stage):
    """The map that both stages train, and their settings."""

    def __init__(self, config: DirectConfig, network: Denoiser, normalizers: NormalizerTable) -> None:
        super().__init__()
        self._config = config
        self.map = network
        self.normalizers = normalizers

    @property
    def needs(self) -> StageNeeds:
        """The stage needs the ends of trajectories alone, which are Mc-Di's last targets."""
        return StageNeeds(num_targets=1)


class RegressionStage(_DirectStage):
    """Minimises the squared error to the stored weights, in units of each tensor's scale."""

    name = "regression"
    is_optional = True

    @property
    def config(self) -> StageConfig:
        """Returns the settings of this stage."""
        return self._config.regression

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Initialises the network's statistics of support sets."""
        self.map.setup(batches, predicts_weights=True)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the mean squared error per value."""
        written_BD = _states(self.map, batch.condition, batch.layout)
        stored_BD = self.normalizers[batch.layout.id][1].normalise(batch.values_BD)
        states_B1D = self.map.encode(stored_BD.unsqueeze(1), batch.condition, batch.layout)
        loss = (written_BD - states_B1D.squeeze(1)).square().mean()
        return StageLoss(loss=loss, metrics={})


class DirectTaskLossStage(_DirectStage):
    """Minimises the task's loss of the written networks on query samples."""

    name = "task_loss"
    is_optional = True

    @property
    def config(self) -> StageConfig:
        """Returns the settings of this stage."""
        return self._config.task_loss

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Initialises the network's statistics of support sets, unless the stage before has."""
        if self._config.regression.num_steps == 0:
            self.map.setup(batches, predicts_weights=True)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the class-balanced cross-entropy of the written networks."""
        states_BD = _states(self.map, batch.condition, batch.layout)
        written_BD = self.map.decode(states_BD, batch.condition, batch.layout)
        loss_B, accuracy_B = task_loss(self.normalizers[batch.layout.id][1].denormalise(written_BD), batch)
        return StageLoss(loss=loss_B.mean(), metrics={"accuracy": accuracy_B.mean().detach()})


def _states(network: Denoiser, condition: Condition, layout: Layout) -> Tensor:
    """Returns the network's output `(B, D)` for a zero state at the beginning of the chain."""
    B = len(condition)
    empty_B1D = condition.samples_BSF.new_zeros(B, 1, layout.num_values)
    time_B1 = condition.samples_BSF.new_zeros(B, 1)
    return network(empty_B1D, time_B1, condition.samples_BSF, condition.labels_BS, layout).squeeze(1)
