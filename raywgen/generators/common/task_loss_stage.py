"""The stage that trains whatever writes whole networks in one pass by the loss of their tasks."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from raywgen.generators.common.task_loss import BYTES_PER_VALUE, task_loss
from raywgen.generators.settings import StageConfig
from raywgen.generators.stage import Stage, StageLoss, StageNeeds
from raywgen.nn.batch_norm import Statistics
from raywgen.weights import KeyedNoise, WeightBatch


class TaskLossStage(Stage):
    """Minimises the task's loss of the written networks on query samples.

    Args:
        config: The stage's settings.
        statistics: Statistics of batch normalisation in the networks: `stored` or `batch`.
    """

    name = "task_loss"

    def __init__(self, config: StageConfig, statistics: Statistics = "stored") -> None:
        super().__init__()
        self._config = config
        self._statistics: Statistics = statistics

    @property
    def config(self) -> StageConfig:
        """Returns the settings of this stage."""
        return self._config

    @property
    def needs(self) -> StageNeeds:
        """The stage needs tasks, and whole networks to run."""
        return StageNeeds()

    @property
    def bytes_per_value(self) -> float:
        """A value, what it was made from, and gradients; a stage that keeps more says so."""
        return BYTES_PER_VALUE

    @abstractmethod
    def written(self, batch: WeightBatch, noise: KeyedNoise) -> tuple[Tensor, StageLoss | None]:
        """Returns networks for a batch's conditions, and what is minimised beside their loss; None for nothing.

        Networks are flat vectors `(B, D)`, differentiable in the parameters.
        """

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the class-balanced cross-entropy on the query samples, and what `written` adds to it."""
        values_BD, beside = self.written(batch, noise)
        loss_B, accuracy_B = task_loss(values_BD, batch, statistics=self._statistics)
        found = StageLoss(loss=loss_B.mean(), metrics={"accuracy": accuracy_B.mean().detach()})
        if beside is None:
            return found
        return StageLoss(loss=found.loss + beside.loss, metrics=found.metrics | beside.metrics)
