"""Windows of optimisation trajectories as a stream of batches.

Shape legend: B windows of a batch on this worker, A states of a window, D values of the flat vector, W windows of an
epoch.
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
        corpus: Where from.
        batch_size: Windows of a batch over all workers.
        num_targets: k: keep k + 1 states of each trajectory, evenly spaced in steps, both ends among them; None keeps
            all that `terms` select.
        length: l: every stretch of l transitions (l + 1 states) is a window; None makes each trajectory one window.
        terms: Which checkpoints, as `Corpus.query` takes them; so they choose steps too, such as `step>=100`.
        seed: The order of an epoch depends on it alone.
        rank: This worker.
        num_workers: Of how many.
        cursor: Where to go on.
        prefetch: Batches read ahead by a thread; 0 reads when asked.

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
        """This worker's part of a batch."""
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
