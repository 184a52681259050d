"""A hypernetwork that writes units in place of values at places, so that any width and depth is just a number.

A chunk of a flat vector begins elsewhere in each width, so what is learned of one width says little of another. Here a
hidden unit has a code, and its incoming row, outgoing column, bias and statistics come from one vector of code, layer
and task (`writer.py`). It is trained by the task's loss alone, on whatever architectures its corpus holds: best on many
that nothing was trained on, of which the corpus holds no more than starts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywgen.generators.common.task_loss_stage import TaskLossStage
from raywgen.generators.interface import DataSpec, Generated, GenerationRequest, Generator
from raywgen.generators.stage import Stage
from raywgen.generators.units.config import UnitsConfig
from raywgen.generators.units.samples import Activations
from raywgen.generators.units.writer import UnitWriter
from raywgen.nn.conditions import SampleEncoder
from raywgen.nn.text_encoders import build_text_encoder
from raywgen.weights import Condition, KeyedNoise, Layout, NormalizerTable, WeightBatch


class Units(Generator[UnitsConfig]):
    """Maps a condition and the units of any layout to weights in one pass."""

    method = "units"
    Config = UnitsConfig

    def __init__(self, config: UnitsConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, normalizers, data)
        H = config.width
        self.text = build_text_encoder(config.text_encoder, H)
        self.samples = SampleEncoder(data.num_features, data.max_classes, H)
        self.task = nn.Sequential(nn.LayerNorm(2 * H), nn.Linear(2 * H, H), nn.LayerNorm(H))
        self.writer = UnitWriter(data.num_features, data.max_classes, H, config.num_layers)

    def all_stages(self) -> list[Stage]:
        """Returns the task-loss stage alone."""
        return [UnitsStage(self)]

    def values(self, condition: Condition, layout: Layout, noise: KeyedNoise, code_noise: float) -> Tensor:
        """Returns flat vectors `(B, D)`, differentiable in all parameters.

        Args:
            condition: B conditions.
            layout: Any layout.
            noise: B rows of noise on the codes of units.
            code_noise: Its size.
        """
        samples_BSF = condition.samples_BSF[..., : self.data.num_features]
        parts_B2H = torch.cat([self.text(condition.instructions), self.samples(samples_BSF, condition.labels_BS)], -1)
        support = Activations.of_samples(samples_BSF, condition.labels_BS, self.data.max_classes)
        return self.writer(layout, self.task(parts_B2H), support, noise, code_noise)

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Writes networks; at temperature 0 the same condition gives the same network."""
        self.resolve_sampling(request.sampling)
        code_noise = self.config.code_noise * request.temperature
        values_BD = self.values(request.condition, request.layout, request.noise, code_noise)
        return Generated(values_BD=values_BD, log_prob_B=None)


class UnitsStage(TaskLossStage):
    """Trains the units, with noise on their codes."""

    def __init__(self, generator: Units) -> None:
        super().__init__(generator.config.task_loss, generator.config.statistics)
        self.generator = generator

    def written(self, batch: WeightBatch, noise: KeyedNoise) -> Tensor:
        """Returns flat vectors `(B, D)`, differentiable in all parameters."""
        return self.generator.values(batch.condition, batch.layout, noise, self.generator.config.code_noise)
