"""A generator of your own: conditional flow matching on normalised flat vectors (Lipman et al. 2023, arXiv 2210.02747).

A network's weights x_1, in units of each tensor's spread, are the end of a straight path that begins at noise x_0. The
velocity v is learned given the support set c (Tong et al. 2024, arXiv 2302.00482, eq. 14 with sigma = 0), and a new
network is the end of the differential equation that it defines, solved by Euler's method from t = 0 to 1:

    x_t = (1 - t) x_0 + t x_1,   x_0 ~ N(0, I),   t ~ U(0, 1)
    loss = mean | v(x_t, t, c) - (x_1 - x_0) |^2
    dx / dt = v(x, t, c)

Train it on the zoo of digits, and write networks for questions of the zoo:

    raywgen zoo train digits out=runs/zoo/corpus
    raywgen train examples.flow_matching:FlowMatching corpus=runs/zoo/corpus out=runs/flow num_workers=0
    raywgen generate generator=runs/flow corpus=runs/zoo/corpus out=runs/flow/networks --trust examples

Shape letters beyond the legend in `raywgen.weights`: Z values of a state, which are D unless the network is a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raywgen.generators import (
    DataSpec,
    Generated,
    GenerationRequest,
    GeneratorConfig,
    OptimizerConfig,
    Sampling,
    Stage,
    StageConfig,
    StageLoss,
    StageNeeds,
)
from raywgen.generators.common.denoisers import Denoiser, build_denoiser
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.support_set import SupportSetGenerator
from raywgen.weights import KeyedNoise, NormalizerTable, WeightBatch


@dataclass(frozen=True, kw_only=True)
class FlowSampling(Sampling):
    """The settings by which networks are drawn, given as `sampling.num_steps=...` when they are generated.

    Attributes:
        num_steps: Steps of Euler's method.
    """

    num_steps: int = 10

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: must be at least 1")


@dataclass(kw_only=True)
class FlowConfig(GeneratorConfig):
    """The settings, given as `generator.flow.num_steps=...` when it is trained.

    Attributes:
        network: Kind and sizes of the network that gives the velocity.
        flow: The only stage; its name is the key of its settings.
        sampling: How networks are drawn where a request does not say it.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    flow: StageConfig = field(
        default_factory=lambda: StageConfig(
            num_steps=2000, batch_size=64, optimizer=OptimizerConfig(weight_decay=0.0, ema_decay=0.99)
        )
    )
    sampling: FlowSampling = field(default_factory=FlowSampling)


class FlowMatching(SupportSetGenerator[FlowConfig]):
    """Carries noise to weights along a learned velocity."""

    Config = FlowConfig
    Sampling = FlowSampling

    def __init__(self, config: FlowConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, config.network, normalizers, data)
        self.velocity = build_denoiser(config.network, self.normalizers, data)

    @property
    def network(self) -> Denoiser:
        """Returns the network that gives the velocity."""
        return self.velocity

    def all_stages(self) -> list[Stage]:
        """Flow matching alone."""
        return [FlowStage(self.config.flow, self.velocity, self.normalizers)]

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Solves the differential equation from noise, which the temperature scales."""
        sampling = self.resolve_sampling(request.sampling)
        assert isinstance(sampling, FlowSampling)
        condition, layout = request.condition, request.layout
        state_BZ = request.temperature * request.noise.normal(self.velocity.num_states(layout))
        for step in range(sampling.num_steps):
            time_B1 = torch.full_like(state_BZ[:, :1], step / sampling.num_steps)
            state_B1Z = state_BZ.unsqueeze(1)
            velocity_B1Z = self.velocity(state_B1Z, time_B1, condition.samples_BSF, condition.labels_BS, layout)
            state_BZ = state_BZ + velocity_B1Z.squeeze(1) / sampling.num_steps
        values_BD = self.velocity.decode(state_BZ, condition, layout)
        return Generated(values_BD=self.normalizer(layout, request.normalizer).denormalise(values_BD), log_prob_B=None)


class FlowStage(Stage):
    """Regresses the velocity of straight paths from noise to stored weights."""

    name = "flow"

    def __init__(self, config: StageConfig, velocity: Denoiser, normalizers: NormalizerTable) -> None:
        super().__init__()
        self._config = config
        self.velocity = velocity
        self.normalizers = normalizers

    @property
    def config(self) -> StageConfig:
        """The stage's length, batch size and optimiser."""
        return self._config

    @property
    def needs(self) -> StageNeeds:
        """Tasks with their support sets, and the ends of trajectories, whole."""
        return StageNeeds(num_targets=1)

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Shows the network what support sets look like."""
        self.velocity.setup(batches, predicts_weights=False)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Mean squared error of the velocity at one point of each network's path."""
        condition, layout = batch.condition, batch.layout
        values_B1D = self.normalizers[layout.id][1].normalise(batch.values_BD).unsqueeze(1)
        end_B1Z = self.velocity.encode(values_B1D, condition, layout)
        start_B1Z, time_B1 = noise.normal(*end_B1Z.shape[1:]), noise.uniform(1)
        state_B1Z = torch.lerp(start_B1Z, end_B1Z, time_B1.unsqueeze(-1))
        velocity_B1Z: Tensor = self.velocity(state_B1Z, time_B1, condition.samples_BSF, condition.labels_BS, layout)
        return StageLoss(loss=(velocity_B1Z - (end_B1Z - start_B1Z)).square().mean(), metrics={})
