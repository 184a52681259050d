"""The process that trains, as the trainer sees it: this one, or one of Ray Train's workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from raywgen.generators import Stage
from raywgen.training.engine import Engine, EngineSettings


class StopRequest(Protocol):
    """The source of requests to stop a run before its end, such as signals."""

    def asked(self) -> bool:
        """Whether this worker shall stop; one worker's yes counts for all."""
        ...

    def awaited(self) -> AbstractContextManager[None]:
        """Wraps the training steps, after each of which `asked` is called."""
        ...


class WorkerContext(Protocol):
    """The process that trains, one of `num_workers`.

    Attributes:
        rank: Its number; 0 writes the files.
        num_workers: Size of the group.
        device: The device it trains on.
    """

    rank: int
    num_workers: int
    device: torch.device

    @property
    def stop(self) -> StopRequest:
        """Tells whether to stop."""
        ...

    def engine(self, stage: Stage, settings: EngineSettings) -> Engine:
        """The engine that takes the steps of a stage."""
        ...

    def memory(self) -> int:
        """The bytes that each worker may use of its device."""
        ...

    def is_warned(self) -> bool:
        """Whether this worker has learned that a node of the group will be taken away soon."""
        ...

    def place(self) -> str:
        """The node, process and log of this worker, in words."""
        ...

    def exchange(self, text: str) -> list[str]:
        """Returns the texts of all workers, by rank; every worker must call it."""
        ...

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives all workers the first one's values of some tensors, in place."""
        ...

    def check_agreement(self, parts: Mapping[str, str]) -> None:
        """Raises on all workers if one of them holds something else."""
        ...
