"""Batch t of a stage, as one worker sees it.

All workers agree on one global order: batch t is the same set of checkpoints, samples and noise whatever the number of
workers, and each takes its own part of it. A batch is of one layout; layouts take turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raywgen.generators import Stage
from raywgen.tasks import Task, draw_condition, draw_few_shot
from raywgen.training.rows import LayoutRows, trajectory_rows
from raywgen.weights import Condition, KeyedNoise, WeightBatch

_CONDITION_STREAM = 1_000
_QUERY_STREAM = 1_001
STAGE_STREAM = 2_000


@dataclass(frozen=True, slots=True)
class StageView:
    """The stage that a batch is for, with the seed and the stream of its noise."""

    stage: Stage
    seed: int
    stream: int

    def noise(self, sample_index_B: Tensor) -> KeyedNoise:
        """Returns the stage's noise for some samples of the run."""
        return KeyedNoise(self.seed, sample_index_B, self.stream)


class BatchPlan:
    """Batch t of a stage, as one worker sees it.

    Args:
        rows: The checkpoints to draw from.
        seed: Seed of the order, of conditions and of queries.
        num_condition_samples: Labelled samples shown per network.
        num_query_samples: Further labelled samples per network.
        shot: Labelled samples of each class shown per network, none of them among its query; 0 draws both at random.
        num_targets: Local targets of each trajectory; 0 takes every checkpoint on its own.
        rank: This worker.
        num_workers: Number of workers.
        device: The device of the batches.
    """

    def __init__(
        self,
        rows: list[LayoutRows],
        *,
        seed: int,
        num_condition_samples: int,
        num_query_samples: int,
        shot: int = 0,
        num_targets: int = 0,
        rank: int = 0,
        num_workers: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._rows = [trajectory_rows(of_layout, num_targets) for of_layout in rows] if num_targets else rows
        self._seed = seed
        self._shot = shot
        self._num_condition_samples = num_condition_samples
        self._num_query_samples = num_query_samples
        self._rank = rank
        self._num_workers = num_workers
        self._device = device or torch.device("cpu")
        self._permutations: dict[tuple[int, int], Tensor] = {}

    @property
    def num_layouts(self) -> int:
        """Layouts that take turns."""
        return len(self._rows)

    def build_modules(self, stage: Stage) -> None:
        """Builds the networks that batches of a stage hold, in this thread.

        Their first values come from torch's own generator, from which a thread that draws batches ahead must take none:
        dropout takes its masks from it at the same time.
        """
        for rows in self._rows:
            if stage.windows(rows.layout, KeyedNoise(0, torch.zeros(1, dtype=torch.int64))) is None:
                rows.module()

    def for_stage(
        self, step: int, batch_size: int, view: StageView, *, whole: bool = False
    ) -> tuple[WeightBatch, KeyedNoise]:
        """Returns batch `step` as a stage sees it, windows only where these suffice, and the stage's noise.

        Args:
            step: Number of the batch.
            batch_size: Networks of all workers together.
            view: The stage, and the seed and stream of its noise.
            whole: Whether to return all of the batch, the same on every worker, in place of this worker's part.
        """
        stage = view.stage
        place_B = torch.arange(batch_size) if whole else torch.arange(self._rank, batch_size, self._num_workers)
        turn = step % len(self._rows)
        rows = self._rows[turn]
        first = step // len(self._rows) * batch_size
        row_B = self._row_indices(turn, first + place_B)
        sample_index_B = step * batch_size + place_B
        noise = view.noise(sample_index_B)
        windows = stage.windows(rows.layout, noise)
        tasks = [rows.tasks[int(row)] for row in row_B]
        condition, query = self._samples(tasks, sample_index_B)
        condition = replace(condition, policies=tuple(rows.policies[int(row)] for row in row_B))
        reads_tokens = stage.tokens != "none" and rows.tokens is not None
        batch = WeightBatch(
            values_BD=torch.empty(len(row_B), 0) if reads_tokens else rows.values(row_B, windows),
            codes_BWL=rows.codes(row_B, windows) if reads_tokens else None,
            layout=rows.layout,
            # A network is as large as what it is generated for, and windows of it are run through none.
            module=self._moved(rows.module()) if windows is None else nn.Module(),
            condition=condition,
            query=query,
            sample_index_B=sample_index_B,
            targets_BAD=rows.targets(row_B, windows),
            windows=windows,
        )
        return batch.to(self._device), noise.to(self._device)

    def _moved(self, module: nn.Module) -> nn.Module:
        """Moves a module once, for the sake of tensors that are in no `state_dict`, which no batch brings."""
        tensors = [*module.parameters(), *module.buffers()] if self._device.type != "cpu" else []
        return module.to(self._device) if any(tensor.device != self._device for tensor in tensors) else module

    def _samples(self, tasks: list[Task], sample_index_B: Tensor) -> tuple[Condition, Condition]:
        """Returns the conditions of the networks, and the query samples by which they are judged."""
        condition_noise = KeyedNoise(self._seed, sample_index_B, _CONDITION_STREAM)
        if self._shot:
            return draw_few_shot(tasks, self._shot, self._num_query_samples, condition_noise)
        query_noise = KeyedNoise(self._seed, sample_index_B, _QUERY_STREAM)
        condition = draw_condition(tasks, self._num_condition_samples, condition_noise)
        return condition, draw_condition(tasks, self._num_query_samples, query_noise)

    def _row_indices(self, turn: int, position_B: Tensor) -> Tensor:
        """Rows at positions of the layout's endless sequence of epochs, each a permutation of its own."""
        count = len(self._rows[turn].tasks)
        epochs = [int(position) // count for position in position_B]
        wanted = {(turn, epoch) for epoch in epochs}
        for key in wanted:
            if key not in self._permutations:
                # One epoch per layout is kept, and the next while a batch straddles both.
                stale = [old for old in self._permutations if old[0] == turn and old[1] < min(epochs)]
                for old in stale:
                    del self._permutations[old]
                self._permutations[key] = self._permutation(*key, count)
        return torch.stack(
            [
                self._permutations[turn, epoch][int(position) % count]
                for epoch, position in zip(epochs, position_B, strict=True)
            ]
        )

    def _permutation(self, turn: int, epoch: int, count: int) -> Tensor:
        key = KeyedNoise(self._seed, torch.tensor([epoch]), turn).uniform(count)
        return key[0].argsort(stable=True)
