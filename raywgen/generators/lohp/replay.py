"""A replay buffer of past rollouts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.weights import KeyedNoise, WeightBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A batch with the paths that were made for it.

    Attributes:
        batch: The networks.
        states_BALD: States of every sub-trajectory, with its start and its end.
    """

    batch: WeightBatch
    states_BALD: Tensor

    @classmethod
    def join(cls, parts: Sequence[Rollout]) -> Rollout:
        """Joins the rollouts of parts of one batch."""
        if len(parts) == 1:
            return parts[0]
        batch = WeightBatch.join([part.batch for part in parts])
        return cls(batch=batch, states_BALD=torch.cat([part.states_BALD for part in parts]))


class ReplayBuffer:
    """Keeps the newest rollouts; which one is drawn depends on the step alone.

    Args:
        size: Number of rollouts that are kept.
    """

    def __init__(self, size: int) -> None:
        self._kept: deque[Rollout] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Rollout]:
        """Yields the rollouts, the oldest one first."""
        return iter(self._kept)

    def add(self, rollout: Rollout) -> None:
        """Adds a rollout; a full buffer drops its oldest one."""
        self._kept.append(rollout)

    def draw(self, step: int) -> Rollout:
        """Returns a rollout, each with equal probability."""
        assert self._kept, "an empty buffer"
        return self._kept[int(KeyedNoise(0, torch.tensor([step])).integers(len(self._kept))[0])]
