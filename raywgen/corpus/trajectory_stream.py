"""Streams batches of windows of optimisation trajectories.

Shape letter beyond the legend in `raywgen.weights`: M windows of an epoch. Here B is the number of windows of a batch
on this worker, and A that of the states of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from raywgen.corpus.batch_stream import BatchStream, check_shares, select
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.order import Cursor, EpochOrder
from raywgen.corpus.trajectory_windows import TrajectoryBatch, cut_windows

_BLOCK_VALUES = 1 << 20
_BLOCKS_PER_WINDOW = 16


class TrajectoryStream(BatchStream[TrajectoryBatch]):
    """Endless batches of trajectory windows of one layout.

    Args:
        corpus: The corpus to read.
        batch_size: Number of windows of a batch, over all workers.
        num_targets: k: keep k + 1 states of each trajectory, evenly spaced in steps, including both ends; None keeps
            all that `terms` select.
        length: l: every run of l transitions (l + 1 states) is a window; None makes each trajectory one window.
        terms: Query that selects checkpoints, as for `Corpus.query`, including steps, such as `step>=100`.
        seed: Seed of the order; the order of an epoch depends on nothing else.
        rank: Rank of this worker.
        num_workers: Number of workers.
        cursor: The batch to start with.
        prefetch: Number of batches that a thread reads ahead; 0 reads on demand.

    Raises:
        CorpusError: Nothing is selected, several layouts are, no trajectory is long enough, or a number is out of
            range.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_size: int,
        num_targets: int | None = None,
        length: int | None = None,
        terms: Sequence[str] = (),
        seed: int = 0,
        rank: int = 0,
        num_workers: int = 1,
        cursor: Cursor | None = None,
        prefetch: int = 2,
    ) -> None:
        check_shares(batch_size, rank, num_workers, prefetch)
        self.facts = select(corpus, terms, ["trajectory_id", "step"])
        layouts = set(self.facts.column("layout_id").to_pylist())
        if len(layouts) > 1:
            raise CorpusError(
                f"{corpus.location}: trajectories of {len(layouts)} layouts are selected; choose one by layout_id or "
                "architecture, and mix streams of several by MixedStream"
            )
        self.layout = corpus.layout(layouts.pop())
        self._corpus = corpus
        self._row_MA = cut_windows(self.facts, num_targets, length, corpus.location)
        self._step_N = self.facts.column("step").to_numpy()
        values = self.layout.num_values * self._row_MA.shape[1]
        order = EpochOrder(
            len(self._row_MA),
            batch_size,
            block_size=max(1, _BLOCK_VALUES // max(1, values)),
            blocks_per_window=_BLOCKS_PER_WINDOW,
            seed=seed,
        )
        super().__init__(order, rank=rank, num_workers=num_workers, cursor=cursor, prefetch=prefetch)

    def read(self, cursor: Cursor) -> TrajectoryBatch:
        """Reads this worker's part of a batch."""
        row_BA = self._row_MA[self.items(cursor)]
        # Windows of one trajectory overlap: each state is read once.
        rows, place = np.unique(row_BA, return_inverse=True)
        values_BAD = torch.empty(*row_BA.shape, self.layout.num_values)
        if rows.size:
            values_ND = self._corpus.values(self.facts.take(rows))
            values_BAD = values_ND[torch.from_numpy(place.reshape(row_BA.shape))]
        return TrajectoryBatch(
            values_BAD=values_BAD,
            step_BA=torch.from_numpy(self._step_N[row_BA]),
            checkpoint_BA=torch.from_numpy(row_BA),
            cursor=self.after(cursor),
        )
