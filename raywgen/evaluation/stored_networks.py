"""The networks that a generator was trained on, read from their shards in blocks: nothing here holds all of them.

Shape letter beyond the legend in `raywgen.weights`: R stored networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.training.stored_weights import StoredWeights, Weights, whole_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNetworks:
    """The training networks of one layout: the end of every training trajectory.

    Attributes:
        weights: The reader of their flat vectors.
        task_ids: Id of each one's task.
        instructions: Instruction of each one's task.
    """

    weights: Weights
    task_ids: list[str]
    instructions: list[str]

    @classmethod
    def of(cls, corpus: Corpus, layout_id: str) -> Self:
        """Lists the networks of a layout; their weights stay where they are."""
        rows = corpus.select(layout_id=layout_id, split="train").sort_by("step")
        last = {name: index for index, name in enumerate(rows.column("trajectory_id").to_pylist())}
        rows = rows.take(sorted(last.values()))
        task_ids = rows.column("task_id").to_pylist()
        return cls(
            weights=StoredWeights(corpus, corpus.layout(layout_id), rows),
            task_ids=task_ids,
            instructions=[corpus.tasks[task_id].instruction for task_id in task_ids],
        )

    def __len__(self) -> int:
        return len(self.task_ids)

    def values(self, index: Tensor) -> Tensor:
        """Reads the flat vectors `(..., D)` of networks by their indices, int64 of any shape."""
        return self.weights.values(index.flatten()).unflatten(0, index.shape)


@dataclass(slots=True)
class CoordinateMoments:
    """Mean and spread of each value of a flat vector over many networks, added block by block.

    Blocks are merged by the rule of Chan, Golub and LeVeque (1979), eq. 2.1, in float64. A single block gives the mean
    and the deviation that torch takes of it, to the last bit.

    Attributes:
        count: Networks seen.
        mean_D: Mean of each value, float64.
        squares_D: Sum of the squared distances from it, float64.
    """

    count: int
    mean_D: Tensor
    squares_D: Tensor

    @classmethod
    def measure(
        cls, weights: Weights, num_values: int, convert: Callable[[Tensor], Tensor] = lambda values_BD: values_BD
    ) -> Self:
        """Reads all networks once, and takes the moments of their values after `convert`."""
        moments = cls(0, torch.zeros(num_values, dtype=torch.float64), torch.zeros(num_values, dtype=torch.float64))
        for _, values_BD in whole_blocks(weights, num_values):
            moments.add(convert(values_BD))
        return moments

    def add(self, values_BD: Tensor) -> None:
        """Adds more networks."""
        count = len(values_BD)
        before, self.count = self.count, self.count + count
        if count > 1:
            self.squares_D += values_BD.std(dim=0).double().square() * (count - 1)
        offset_D = values_BD.mean(dim=0).double() - self.mean_D
        self.squares_D += offset_D.square() * (before * count / self.count)
        self.mean_D += offset_D * (count / self.count)

    @property
    def deviation_D(self) -> Tensor:
        """Standard deviation of each value, float64; 0 over a single network."""
        return (self.squares_D / max(1, self.count - 1)).sqrt()
