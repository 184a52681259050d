"""Batch t of a stage, as one worker sees it: what is read of the corpus, with conditions, queries and modules.

`batch_order.py` says which networks make a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from raywgen.generators import Stage
from raywgen.tasks import Task, draw_condition, draw_few_shot
from raywgen.tasks.augment import augment_each
from raywgen.training.batch_order import BatchDraw, BatchOrder, StageView, StoredBatch
from raywgen.training.rows import LayoutRows, trajectory_rows
from raywgen.weights import Condition, KeyedNoise, WeightBatch

_CONDITION_STREAM = 1_000
_QUERY_STREAM = 1_001
_AUGMENT_STREAM = 1_002
STAGE_STREAM = 2_000
VALIDATION_BATCH = 64
ReadBatch = Callable[[BatchDraw], StoredBatch]
"""Returns what a part of a batch holds of the corpus."""


def num_validation_parts(batch_size: int, num_workers: int, accumulate: int) -> int:
    """Returns the parts in which a worker validates, none larger than those in which it takes a training step."""
    share, part = max(VALIDATION_BATCH, num_workers) / num_workers, math.ceil(batch_size / num_workers) / accumulate
    return math.ceil(math.ceil(share) / math.ceil(part))


class BatchPlan:
    """Batch t of a stage, as one worker sees it.

    Args:
        rows: The checkpoints to draw from.
        seed: Seed of the order, of conditions and of queries.
        num_condition_samples: Labelled samples shown per network.
        num_query_samples: Further labelled samples per network.
        shot: Labelled samples of each class shown per network, none of them among its query; 0 draws both at random.
        augment: Changes of the query's images: `flip`, `shift-K`, both joined by `+`, or empty for none.
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
        augment: str = "",
        num_targets: int = 0,
        rank: int = 0,
        num_workers: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.rows = [trajectory_rows(of_layout, num_targets) for of_layout in rows] if num_targets else rows
        self._seed = seed
        self._shot = shot
        self._augment = augment
        self._num_condition_samples = num_condition_samples
        self._num_query_samples = num_query_samples
        self._device = device or torch.device("cpu")
        self.order = BatchOrder(self.rows, seed=seed, rank=rank, num_workers=num_workers)

    @property
    def num_layouts(self) -> int:
        """Layouts that take turns."""
        return len(self.rows)

    def build_modules(self, stage: Stage) -> None:
        """Builds the networks that batches of a stage hold, in this thread.

        Their first values come from torch's own generator, from which a thread that draws batches ahead must take none:
        dropout takes its masks from it at the same time.
        """
        for rows in self.rows:
            if stage.windows(rows.layout, KeyedNoise(0, torch.zeros(1, dtype=torch.int64))) is None:
                rows.module()

    def for_stage(
        self, step: int, batch_size: int, view: StageView, *, whole: bool = False, read: ReadBatch | None = None
    ) -> tuple[WeightBatch, KeyedNoise]:
        """Returns batch `step` as a stage sees it, windows only where these suffice, and the stage's noise.

        Args:
            step: Number of the batch.
            batch_size: Networks of all workers together.
            view: The stage, and the seed and stream of its noise.
            whole: Whether to return all of the batch, the same on every worker, in place of this worker's part.
            read: Reads what the batch holds of the corpus; by default it is read here.
        """
        return self._batch(self.order.draw(step, batch_size, view, whole=whole), view, read)

    def parts_for_stage(
        self, step: int, batch_size: int, view: StageView, accumulate: int
    ) -> Iterator[tuple[WeightBatch, KeyedNoise, int]]:
        """Yields a worker's share of a batch in parts as small as those of a training step, each read when asked for.

        All workers have equally many, as collectives may run in each: where a worker has no network left for a part, it
        has one again that counts for nothing.

        Args:
            step: Number of the batch.
            batch_size: Networks of all workers together.
            view: The stage, and the seed and stream of its noise.
            accumulate: Parts of a worker's share in a training step.

        Yields:
            A part, the stage's noise, and how many networks it counts for.
        """
        draw = self.order.draw(step, batch_size, view)
        num_parts = num_validation_parts(view.stage.config.batch_size, self.order.num_workers, accumulate)
        for index_N in torch.arange(len(draw.row_B)).tensor_split(num_parts):
            yield *self._batch(draw.take(index_N if len(index_N) else torch.tensor([0])), view), len(index_N)

    def _batch(self, draw: BatchDraw, view: StageView, read: ReadBatch | None = None) -> tuple[WeightBatch, KeyedNoise]:
        rows, row_B, windows = self.rows[draw.turn], draw.row_B, draw.windows
        sample_index_B, noise = draw.sample_index_B, draw.noise
        tasks = [rows.tasks[int(row)] for row in row_B]
        condition, query = self._samples(tasks, sample_index_B, is_judged=view.stage.needs.tasks)
        condition = replace(condition, policies=tuple(rows.policies[int(row)] for row in row_B))
        stored = self.order.read(draw, view.stage) if read is None else read(draw)
        batch = WeightBatch(
            values_BD=torch.empty(len(row_B), 0) if stored.values_BD is None else stored.values_BD,
            codes_BWL=stored.codes_BWL,
            layout=rows.layout,
            # A network is as large as what it is generated for, and windows of it are run through none.
            module=self._moved(rows.module()) if windows is None else nn.Module(),
            condition=condition,
            query=query,
            sample_index_B=sample_index_B,
            targets_BAD=stored.targets_BAD,
            moments_BYK=stored.moments_BYK,
            windows=windows,
        )
        return batch.to(self._device), noise.to(self._device)

    def _moved(self, module: nn.Module) -> nn.Module:
        """Moves a module once, for the sake of tensors that are in no `state_dict`, which no batch brings."""
        tensors = [*module.parameters(), *module.buffers()] if self._device.type != "cpu" else []
        return module.to(self._device) if any(tensor.device != self._device for tensor in tensors) else module

    def _samples(self, tasks: list[Task], sample_index_B: Tensor, *, is_judged: bool) -> tuple[Condition, Condition]:
        """Returns the conditions of the networks, and the query samples by which they are judged, if they are."""
        condition_noise = KeyedNoise(self._seed, sample_index_B, _CONDITION_STREAM)
        if self._shot:
            condition, query = draw_few_shot(tasks, self._shot, self._num_query_samples, condition_noise)
            return condition, self._augmented(query, sample_index_B) if is_judged else query
        condition = draw_condition(tasks, self._num_condition_samples, condition_noise)
        if not is_judged:
            nothing = {"samples_BSF": condition.samples_BSF[:, :0], "labels_BS": condition.labels_BS[:, :0]}
            return condition, replace(condition, **nothing)
        query_noise = KeyedNoise(self._seed, sample_index_B, _QUERY_STREAM)
        return condition, self._augmented(draw_condition(tasks, self._num_query_samples, query_noise), sample_index_B)

    def _augmented(self, query: Condition, sample_index_B: Tensor) -> Condition:
        noise = KeyedNoise(self._seed, sample_index_B, _AUGMENT_STREAM)
        return replace(query, samples_BSF=augment_each(query.samples_BSF, self._augment, noise))
