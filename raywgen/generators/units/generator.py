"""A hypernetwork that writes units in place of values at places, so that any width and depth is just a number.

A chunk of a flat vector begins elsewhere in each width, so what is learned of one width says little of another. Here a
hidden unit has a code, and its incoming row, outgoing column, bias and statistics come from one vector of code, layer
and task (`writer.py`). It is trained by the task's loss alone, on whatever architectures its corpus holds: best on many
that nothing was trained on, of which the corpus holds no more than starts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from raywgen.generators.common.task_loss_stage import TaskLossStage
from raywgen.generators.interface import DataSpec, Generated, GenerationRequest, Generator
from raywgen.generators.stage import Stage, StageLoss
from raywgen.generators.units.config import UnitsConfig
from raywgen.generators.units.references import References
from raywgen.generators.units.samples import Activations
from raywgen.generators.units.writer import UnitWriter
from raywgen.nn.conditions import SampleEncoder
from raywgen.nn.text_encoders import build_text_encoder
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy
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
        sizes = data.num_features, data.max_classes, H
        self.references = References(config.num_references, *sizes) if config.num_references else None
        self.writer = UnitWriter(*sizes, config.num_layers, fits_output=self.references is not None)

    def all_stages(self) -> list[Stage]:
        """Returns the task-loss stage alone."""
        return [UnitsStage(self)]

    def tasks(self, condition: Condition) -> Tensor:
        """Returns a vector of each task, `(B, H)`, of about unit size."""
        samples_BSF = condition.samples_BSF[..., : self.data.num_features]
        parts = self.text(condition.instructions), self.samples(samples_BSF, condition.labels_BS)
        return self.task(torch.cat(parts, dim=-1))

    def values(
        self, condition: Condition, task_BH: Tensor, layout: Layout, noise: KeyedNoise, code_noise: float
    ) -> Tensor:
        """Returns flat vectors `(B, D)`, differentiable in all parameters.

        Args:
            condition: B conditions.
            task_BH: Their tasks.
            layout: Any layout.
            noise: B rows of noise on the codes of units.
            code_noise: Its size.
        """
        samples_BSF = condition.samples_BSF[..., : self.data.num_features]
        support = Activations.of_samples(samples_BSF, condition.labels_BS, self.data.max_classes)
        if self.references is not None:
            support = self.references.beside(support, task_BH)
        return self.writer(layout, task_BH, support, noise, code_noise)

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Writes networks; at temperature 0 the same condition gives the same network."""
        self.resolve_sampling(request.sampling)
        code_noise = self.config.code_noise * request.temperature
        tasks_BH = self.tasks(request.condition)
        values_BD = self.values(request.condition, tasks_BH, request.layout, request.noise, code_noise)
        return Generated(values_BD=values_BD, log_prob_B=None)


class UnitsStage(TaskLossStage):
    """Trains the units, with noise on their codes, and beside them the predictor of remembered inputs' labels."""

    def __init__(self, generator: Units) -> None:
        super().__init__(generator.config.task_loss, generator.config.statistics)
        self.generator = generator

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Remembers inputs of the tasks."""
        if self.generator.references is not None:
            self.generator.references.remember(batches, seed)

    def written(self, batch: WeightBatch, noise: KeyedNoise) -> tuple[Tensor, StageLoss | None]:
        """Returns networks, and the loss of the predictor on the query samples."""
        generator = self.generator
        task_BH = generator.tasks(batch.condition)
        values_BD = generator.values(batch.condition, task_BH, batch.layout, noise, generator.config.code_noise)
        if generator.references is None:
            return values_BD, None
        x_BSF, labels_BS = batch.query.samples_BSF[..., : generator.data.num_features], batch.query.labels_BS
        logits_BSC = generator.references.predictor(x_BSF, task_BH)
        accuracy = balanced_accuracy(logits_BSC, labels_BS).mean().detach()
        loss = balanced_cross_entropy(logits_BSC, labels_BS).mean()
        return values_BD, StageLoss(loss=loss, metrics={"predictor_accuracy": accuracy})
