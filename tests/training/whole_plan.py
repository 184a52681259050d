"""A batch plan that hands out whole networks, for tests that train nothing."""

from __future__ import annotations

from typing import Any

from raywgen.generators import StageNeeds
from raywgen.training.batch_plan import BatchPlan, StageView
from raywgen.weights import WeightBatch


class _Whole:
    """Stands for a stage that takes whole networks."""

    tokens = "none"
    needs = StageNeeds()

    def windows(self, *_: object) -> None:
        return None


_STAGE: Any = _Whole()


class WholePlan(BatchPlan):
    """The same order of checkpoints, conditions and queries."""

    def batch(self, step: int, batch_size: int) -> WeightBatch:
        """This worker's part of a batch."""
        return self.for_stage(step, batch_size, StageView(_STAGE, 0, 0))[0]

    def whole_batch(self, step: int, batch_size: int) -> WeightBatch:
        """All of a batch."""
        return self.for_stage(step, batch_size, StageView(_STAGE, 0, 0), whole=True)[0]
