"""Says which networks and windows make a worker's part of batch t, and reads them.

All workers agree on one global order: batch t is the same set of checkpoints, samples and noise whatever the number of
workers, and each takes its own part of it. A batch is of one layout; layouts take turns. Readers in other processes
run the same code, so what they read for a worker is what it would read itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from raywgen.generators import Stage
from raywgen.training.rows import StoredRows
from raywgen.training.stored_weights import StoredWeights
from raywgen.weights import KeyedNoise, Windows


@dataclass(frozen=True, slots=True)
class StageView:
    """The stage that a batch is for, with the seed and the stream of its noise."""

    stage: Stage
    seed: int
    stream: int

    def noise(self, sample_index_B: Tensor) -> KeyedNoise:
        """Returns the stage's noise for some samples of the run."""
        return KeyedNoise(self.seed, sample_index_B, self.stream)


@dataclass(frozen=True, slots=True)
class BatchDraw:
    """A worker's part of a batch, of which nothing is read yet.

    Attributes:
        step: Number of the batch.
        turn: Number of its layout.
        row_B: Rows of the layout.
        sample_index_B: Numbers of the samples in the run.
        noise: The stage's noise, as the windows have left it.
        windows: The windows that the stage sees; None for whole networks.
    """

    step: int
    turn: int
    row_B: Tensor
    sample_index_B: Tensor
    noise: KeyedNoise
    windows: Windows | None

    def take(self, index_N: Tensor) -> BatchDraw:
        """Selects networks by index, in this order."""
        return replace(
            self,
            row_B=self.row_B[index_N],
            sample_index_B=self.sample_index_B[index_N],
            noise=self.noise.take(index_N),
            windows=None if self.windows is None else self.windows.take(index_N),
        )


class StoredBatch(NamedTuple):
    """The tensors that are read of a corpus for a part of a batch: values, local targets and moments, or tokens."""

    values_BD: Tensor | None = None
    targets_BAD: Tensor | None = None
    codes_BWL: Tensor | None = None
    moments_BYK: Tensor | None = None


class BatchOrder:
    """The order of batches, as one worker sees it.

    Args:
        rows: The checkpoints to draw from, by layout.
        seed: Seed of the order.
        rank: This worker.
        num_workers: Number of workers.
    """

    def __init__(self, rows: Sequence[StoredRows], *, seed: int, rank: int = 0, num_workers: int = 1) -> None:
        self.rows, self.seed = rows, seed
        self.rank, self.num_workers = rank, num_workers
        self._permutations: dict[tuple[int, int], Tensor] = {}

    def draw(self, step: int, batch_size: int, view: StageView, *, whole: bool = False) -> BatchDraw:
        """Returns this worker's part of a batch.

        Args:
            step: Number of the batch.
            batch_size: Networks of all workers together.
            view: The stage, and the seed and stream of its noise.
            whole: Whether to return all of the batch, the same on every worker, in place of this worker's part.
        """
        place_B = torch.arange(batch_size) if whole else torch.arange(self.rank, batch_size, self.num_workers)
        turn = step % len(self.rows)
        row_B = self._row_indices(turn, step // len(self.rows) * batch_size + place_B)
        sample_index_B = step * batch_size + place_B
        noise = view.noise(sample_index_B)
        return BatchDraw(step, turn, row_B, sample_index_B, noise, view.stage.windows(self.rows[turn].layout, noise))

    def read(self, draw: BatchDraw, stage: Stage) -> StoredBatch:
        """Reads a part of a batch: tokens where the stage learns from them and there are some, else values."""
        rows = self.rows[draw.turn]
        targets_BAD = rows.targets(draw.row_B, draw.windows)
        if stage.tokens != "none" and rows.tokens is not None:
            return StoredBatch(targets_BAD=targets_BAD, codes_BWL=rows.codes(draw.row_B, draw.windows))
        return StoredBatch(
            values_BD=rows.values(draw.row_B, draw.windows),
            targets_BAD=targets_BAD,
            moments_BYK=rows.header_moments(draw.row_B, draw.windows),
        )

    def num_bytes(self, draw: BatchDraw) -> int:
        """Returns the bytes of the values, local targets and moments of a part of a batch."""
        rows = self.rows[draw.turn]
        num_values = rows.layout.num_values if draw.windows is None else draw.windows.num_values
        num_states = 1 if rows.target_index_NA is None else 1 + rows.target_index_NA.shape[1]
        header = None if draw.windows is None else draw.windows.header
        num_moments = (
            0 if header is None or draw.windows is None else header.index_BY.shape[1] * draw.windows.chunk_length
        )
        return 4 * len(draw.row_B) * (num_values * num_states + num_moments)

    def shards(self, draw: BatchDraw) -> list[str]:
        """Returns the shards that hold the weights of a part of a batch, by their paths in the corpus."""
        rows = self.rows[draw.turn]
        index = rows.index_N if rows.target_index_NA is None else rows.target_index_NA
        assert isinstance(rows.weights, StoredWeights)
        return rows.weights.paths(index[draw.row_B].flatten())

    def _row_indices(self, turn: int, position_B: Tensor) -> Tensor:
        """Rows at positions of the layout's endless sequence of epochs, each a permutation of its own."""
        count = len(self.rows[turn])
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
        key = KeyedNoise(self.seed, torch.tensor([epoch]), turn).uniform(count)
        return key[0].argsort(stable=True)
