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
from raywgen.generators.common.support_set import WindowGenerator
from raywgen.generators.common.targets import normalised
from raywgen.generators.common.task_loss import BYTES_PER_VALUE, task_loss
from raywgen.generators.common.writing import Rows, write_networks
from raywgen.generators.interface import DataSpec, GenerationRequest
from raywgen.generators.settings import GeneratorConfig, StageConfig
from raywgen.generators.stage import Stage, StageLoss, StageNeeds
from raywgen.weights import Condition, KeyedNoise, Layout, NormalizerTable, WeightBatch, Windows


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


class Direct(WindowGenerator[DirectConfig]):
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

    def write(self, request: GenerationRequest, groups: slice) -> Tensor:
        """Writes networks; the same support set gives the same network, whatever the temperature."""
        self.resolve_sampling(request.sampling)
        return _write(self.map, request.condition, request.layout, request.noise, groups)


class _DirectStage(Stage):
    """The map that both stages train, and their settings."""

    def __init__(self, config: DirectConfig, network: Denoiser, normalizers: NormalizerTable) -> None:
        super().__init__()
        self._config = config
        self.map = network
        self.normalizers = normalizers


class RegressionStage(_DirectStage):
    """Minimises the squared error to the stored weights, in units of each tensor's scale."""

    name = "regression"
    is_optional = True

    @property
    def needs(self) -> StageNeeds:
        """The stage needs the ends of trajectories alone, which are Mc-Di's last targets; windows may suffice."""
        return StageNeeds(num_targets=1, whole_networks=self.map.window == 0)

    @property
    def bytes_per_value(self) -> float:
        """The network is evaluated once."""
        return 8 + self.map.bytes_per_value

    def windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws a random window of each network that is longer than the network's own."""
        return self.map.draw_windows(layout, noise)

    @property
    def config(self) -> StageConfig:
        """Returns the settings of this stage."""
        return self._config.regression

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Initialises the network's statistics of support sets."""
        self.map.setup(batches, predicts_weights=True)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the mean squared error per value."""
        batch = self.see(batch, noise)
        condition, layout, windows = batch.condition, batch.layout, batch.windows
        stored_B1D = normalised(batch.values_BD.unsqueeze(1), batch, self.normalizers)
        states_BZ = self.map.encode(stored_B1D, condition, layout, windows).squeeze(1)
        place = self.map.place(layout, windows)
        condition_embedding = self.map.embed_condition(condition.samples_BSF, condition.labels_BS, layout)
        rows = Rows(condition_embedding, noise, place, states_BZ.shape[1])
        square_BZ = (_states(self.map, rows, layout) - states_BZ).square()
        loss = (square_BZ if place is None else square_BZ * place.weight_BX).mean()
        return StageLoss(loss=loss, metrics={})


class DirectTaskLossStage(_DirectStage):
    """Minimises the task's loss of the written networks on query samples."""

    name = "task_loss"
    is_optional = True

    @property
    def needs(self) -> StageNeeds:
        """The stage needs whole networks to run."""
        return StageNeeds(num_targets=1)

    @property
    def config(self) -> StageConfig:
        """Returns the settings of this stage."""
        return self._config.task_loss

    @property
    def bytes_per_value(self) -> float:
        """The network is evaluated once."""
        return BYTES_PER_VALUE + self.map.bytes_per_value

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Initialises the network's statistics of support sets, unless the stage before has."""
        if self._config.regression.num_steps == 0:
            self.map.setup(batches, predicts_weights=True)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the class-balanced cross-entropy of the written networks."""
        written_BD = _write(self.map, batch.condition, batch.layout, noise)
        loss_B, accuracy_B = task_loss(self.normalizers[batch.layout.id][1].denormalise(written_BD), batch)
        return StageLoss(loss=loss_B.mean(), metrics={"accuracy": accuracy_B.mean().detach()})


def _write(
    network: Denoiser, condition: Condition, layout: Layout, noise: KeyedNoise, groups: slice = slice(None)
) -> Tensor:
    """Returns weights in generator units, `(B, D)`, or those of some groups of windows."""
    condition_embedding = network.embed_condition(condition.samples_BSF, condition.labels_BS, layout)

    def follow(rows: Rows) -> Tensor:
        return _states(network, rows, layout)

    return write_networks(network, follow, condition_embedding, condition, layout, noise, groups=groups)


def _states(network: Denoiser, rows: Rows, layout: Layout) -> Tensor:
    """Returns the network's output `(R, Z)` for a zero state at the beginning of the chain."""
    embedding = rows.condition_embedding
    empty_R1Z = torch.zeros(len(embedding), 1, rows.num_states, device=embedding.device)
    time_R1 = torch.zeros(len(embedding), 1, device=embedding.device)
    return network.predict(empty_R1Z, time_R1, embedding, layout, rows.place).squeeze(1)
