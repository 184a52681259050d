"""The engine of many workers that each hold all of a stage: torch's `DistributedDataParallel`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from raywgen.generators import Stage
from raywgen.training.engine.base import EngineSettings
from raywgen.training.engine.local import LocalEngine


class ReplicatedEngine(LocalEngine):
    """Trains on all workers of a process group, and shards nothing.

    DeepSpeed's ZeRO stage 0 would do the same, but it exchanges gradients only after the backward pass.

    Args:
        stage: The stage to train, on this worker's device.
        num_workers: Size of the process group, which is there already.
        settings: Settings of the engine; those of ZeRO have no effect.
    """

    def __init__(self, stage: Stage, num_workers: int, settings: EngineSettings | None = None) -> None:
        self.rank, self.num_workers = torch.distributed.get_rank(), num_workers
        super().__init__(stage, settings)
        # A step need not reach every parameter: a part of a generator may serve some layouts alone.
        self._replicas = DistributedDataParallel(
            stage, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )
        self._module = self._replicas

    def _exchange(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged in the backward pass of the last part alone."""
        return nullcontext() if is_last else self._replicas.no_sync()
