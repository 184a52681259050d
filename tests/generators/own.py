"""Classes that stand for a user's own package: a generator, and some that cannot serve as one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from raywgen.generators import (
    Generated,
    GenerationRequest,
    Generator,
    GeneratorConfig,
    Stage,
    StageConfig,
    StageLoss,
    StageNeeds,
)
from raywgen.weights import KeyedNoise, WeightBatch


@dataclass(kw_only=True)
class OwnConfig(GeneratorConfig):
    """Length of the only stage."""

    only: StageConfig = field(default_factory=StageConfig)


class Unfinished(Generator[OwnConfig]):
    """A generator that has no stages yet."""

    Config = OwnConfig

    def generate(self, request: GenerationRequest) -> Generated:
        """Writes networks of noise."""
        return Generated(values_BD=request.noise.normal(request.layout.num_values), log_prob_B=None)


class Own(Unfinished):
    """A generator that is whole."""

    def all_stages(self) -> list[Stage]:
        """The only one."""
        return [OwnStage(self.config.only)]


class WithoutConfig(Own):
    """A generator whose settings are no dataclass."""

    Config: Any = dict


class WithForeignConfig(Own):
    """A generator whose settings do not inherit `GeneratorConfig`."""

    @dataclass
    class Config:
        """Length of the only stage."""

        only: StageConfig = field(default_factory=StageConfig)


class WithUndecoratedConfig(Own):
    """A generator whose settings are no dataclass of their own."""

    class Config(GeneratorConfig):
        """Length of the only stage."""

        only: StageConfig = StageConfig()


class OwnStage(Stage):
    """Learns the mean of all values."""

    name = "only"

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self._config = config
        self.mean = nn.Linear(1, 1)

    @property
    def config(self) -> StageConfig:
        """Returns the settings of this stage."""
        return self._config

    @property
    def needs(self) -> StageNeeds:
        """Weights alone."""
        return StageNeeds(tasks=False)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Squared distance to the mean."""
        written = self.mean(batch.values_BD.new_ones(1, 1))
        return StageLoss(loss=(batch.values_BD - written).square().mean(), metrics={})
