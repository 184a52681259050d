"""The last stage of Lo-Hp: the policy is trained through its own path by the task's own loss."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from raywgen.generators.common.task_loss import BYTES_PER_VALUE, all_samples, task_loss
from raywgen.generators.common.writing import Rows, write_networks
from raywgen.generators.lohp.config import LoHpConfig, LoHpTaskLossConfig
from raywgen.generators.lohp.following import follow
from raywgen.generators.lohp.policy import Policy
from raywgen.generators.stage import ParameterUse, Stage, StageLoss, StageNeeds
from raywgen.weights import KeyedNoise, NormalizerTable, WeightBatch


class LoHpTaskLossStage(Stage):
    """Trains the policy, as generation follows it, by the task's loss on support and query samples.

    Networks longer than the policy's window are written window by window, as in generation, and run as a whole.
    """

    name = "task_loss"
    is_optional = True

    def __init__(self, config: LoHpConfig, policy: Policy, normalizers: NormalizerTable) -> None:
        super().__init__()
        self._config = config
        self.policy = policy
        self.normalizers = normalizers

    @property
    def config(self) -> LoHpTaskLossConfig:
        """Returns the settings of this stage."""
        return self._config.task_loss

    @property
    def needs(self) -> StageNeeds:
        """The stage needs tasks, and whole networks to run."""
        return StageNeeds()

    @property
    def bytes_per_value(self) -> float:
        """Every step of the path evaluates the policy."""
        return BYTES_PER_VALUE + self._config.sampling.num_steps * (8 + self.policy.forward_net.bytes_per_value)

    @property
    def parameter_use(self) -> ParameterUse:
        """The policy is called again and again."""
        return "whole"

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Initialises the policy from samples, unless the stage before has."""
        if self._config.policy.num_steps == 0:
            self.policy.setup(batches)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the task's loss of the networks at the end of the path."""
        layout, sampling = batch.layout, self._config.sampling
        embedded = self.policy.embed_forward_condition(batch.condition, layout)

        def followed(rows: Rows) -> Tensor:
            return follow(self.policy, rows, layout, sampling.num_steps, self.config.temperature)

        net = self.policy.forward_net
        written_BD = write_networks(net, followed, embedded, batch.condition, layout, noise, sampling.max_rows)
        values_BD = self.normalizers[layout.id][1].denormalise(written_BD)
        loss_B, accuracy_B = task_loss(values_BD, batch, all_samples(batch))
        return StageLoss(loss=loss_B.mean(), metrics={"accuracy": accuracy_B.mean().detach()})
