"""Cuts trajectories into windows of states.

Shape letter beyond the legend in `raywgen.weights`: M windows of all trajectories. Here B is the number of windows of a
batch, and A that of the states of a trajectory or a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from torch import Tensor

from raywgen.corpus.errors import CorpusError
from raywgen.corpus.order import Cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBatch:
    """A batch of trajectory windows of one layout.

    Attributes:
        values_BAD: Flat vectors, float32, in step order.
        step_BA: Steps, int64.
        checkpoint_BA: Rows of the stream's `facts`, which hold task and optimiser, int64.
        cursor: Cursor of the next batch; a new stream with this cursor begins there.
    """

    values_BAD: Tensor
    step_BA: Tensor
    checkpoint_BA: Tensor
    cursor: Cursor


def cut_windows(facts: pa.Table, num_targets: int | None, length: int | None, location: str) -> np.ndarray:
    """Returns the rows of facts of every window, int64 `(M, A)`.

    Args:
        facts: Facts sorted by trajectory and step; states of unknown step (below 0) are dropped.
        num_targets: k; k + 1 states of each trajectory are kept.
        length: l; windows have l transitions; None takes whole trajectories.
        location: Location of the corpus, for messages.

    Raises:
        CorpusError: A number is below 1, no trajectory is long enough, or whole ones differ in length.
    """
    if min(num_targets or 1, length or 1) < 1 or num_targets == 0 or length == 0:
        raise CorpusError(f"num_targets={num_targets}, length={length}: both must be at least 1, or None")
    step_N = facts.column("step").to_numpy()
    windows = []
    for row_A in _trajectories(facts):
        row_A = row_A[step_N[row_A] >= 0]
        if not len(row_A):
            continue
        if num_targets is not None:
            kept = _evenly(step_N[row_A], num_targets)
            if kept is None:
                continue
            row_A = row_A[kept]
        width = len(row_A) if length is None else length + 1
        if 2 <= width <= len(row_A):
            windows.append(np.lib.stride_tricks.sliding_window_view(row_A, width))
    if not windows:
        raise CorpusError(
            f"{location} holds no trajectory with enough states for num_targets={num_targets}, length={length}; record "
            "more steps, or ask for fewer"
        )
    if len(widths := {part.shape[1] for part in windows}) > 1:
        raise CorpusError(
            f"{location}: trajectories have {min(widths)} to {max(widths)} states; give num_targets or length, so that "
            "windows are of one size"
        )
    return np.concatenate(windows)


def _trajectories(facts: pa.Table) -> list[np.ndarray]:
    names = facts.column("trajectory_id").combine_chunks().dictionary_encode()
    codes = names.indices.to_numpy()
    return np.split(np.arange(len(codes)), np.flatnonzero(np.diff(codes)) + 1)


def _evenly(step_A: np.ndarray, num_targets: int) -> np.ndarray | None:
    """Returns the k + 1 states nearest to even spacing, including both ends; None if two of them are the same."""
    wanted = np.linspace(step_A[0], step_A[-1], num_targets + 1)
    nearest = np.abs(step_A[None, :] - wanted[:, None]).argmin(axis=1)
    return nearest if len(np.unique(nearest)) == num_targets + 1 else None
