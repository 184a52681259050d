"""The engine of one process."""

from __future__ import annotations

from torch import Tensor, nn

from raywgen.generators import Stage, StageLoss
from raywgen.nn.precision import autocast, resolved
from raywgen.training.checkpoints.slices import Part
from raywgen.training.engine.base import (
    Engine,
    EngineSettings,
)
from raywgen.training.engine.optimizer_state import Stored, load_optimizer_state, new_optimizer, optimizer_state
from raywgen.weights import KeyedNoise, WeightBatch


class LocalEngine(Engine):
    """Trains in one process with plain torch.

    Args:
        stage: The stage to train.
        settings: Settings of the engine; those of ZeRO have no effect.
    """

    def __init__(self, stage: Stage, settings: EngineSettings | None = None) -> None:
        super().__init__(stage, settings or EngineSettings())
        self._module: nn.Module = stage
        self._device_type = next(stage.parameters()).device.type
        self._precision = resolved(self.settings.precision, self._device_type)
        self._optimizer = new_optimizer(stage)
        self._start_averages()

    def _optimizer_state(self) -> dict[str, Part]:
        return optimizer_state(self.stage, self._optimizer)

    def _load_optimizer_state(self, stored: Stored) -> None:
        load_optimizer_state(self.stage, self._optimizer, stored)

    def _forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        with autocast(self._precision, self._device_type):
            return self._module(batch, noise)

    def _backward(self, loss: Tensor, share: float, *, is_first: bool) -> None:
        if is_first:
            self._optimizer.zero_grad()
        (loss if share == 1 else loss * share).backward()

    def _step(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        nn.utils.clip_grad_norm_(self.stage.parameters(), self.stage.config.optimizer.grad_clip)
        self._optimizer.step()
