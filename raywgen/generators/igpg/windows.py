"""Cuts a network's chunks into the windows that the prior sees at once (IGPG, section 3, generation).

Shape legend: B networks, N windows, W chunks of a window, M chunks, X chunks of all blocks that a window may touch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from raywgen.generators.common.tokenizer.chunk_table import HeaderChunks
from raywgen.generators.igpg.config import SamplingConfig


@dataclass(frozen=True, slots=True)
class Window:
    """Chunks `start` to `stop` are seen, those from `new` on are written.

    Chunks from `stop` on are padding where `stop` goes beyond the network's end, or that of its part.
    """

    start: int
    new: int
    stop: int


def plan_windows(num_chunks: int, window: int, sampling: SamplingConfig) -> list[Window]:
    """Windows that write every chunk once, in order.

    A network that fits is one window in either mode. Parallel windows are equally long, so that they make one batch.

    Args:
        num_chunks: M.
        window: Most chunks of a window; 0 for all.
        sampling: Says whether windows, or single chunks, stand alone, and else their overlap.
    """
    if sampling.chunks == "independent":
        return [Window(m, m, m + 1) for m in range(num_chunks)]
    if window == 0 or num_chunks <= window:
        return [Window(0, 0, num_chunks)]
    if sampling.windows == "parallel":
        num_windows = -(-num_chunks // window)
        length = -(-num_chunks // num_windows)
        return [Window(start, start, start + length) for start in range(0, num_chunks, length)]
    tail = min(max(1, int(sampling.overlap * window)), window - 1)
    plan = [Window(0, 0, window)]
    while (stop := plan[-1].stop) < num_chunks:
        plan.append(Window(stop - tail, stop, min(stop - tail + window, num_chunks)))
    return plan


@dataclass(frozen=True, slots=True)
class Part:
    """Chunks up to `stop`, written by windows that see none of another part."""

    plan: list[Window]
    stop: int


def plan_parts(num_chunks: int, header: HeaderChunks | None, window: int, sampling: SamplingConfig) -> list[Part]:
    """A network as a whole; or its leading chunks, which are told to what is written after them, and the others.

    Args:
        num_chunks: M.
        leading: Chunks whose numbers later windows are told, if any. In a single window they are seen.
        window: As in `plan_windows`.
        sampling: Likewise.
    """
    ends = [0, num_chunks]
    if header is not None and (sampling.chunks == "independent" or 0 < window < num_chunks):
        ends.insert(1, header.num)
    parts = []
    for start, stop in pairwise(ends):
        plan = plan_windows(stop - start, window, sampling)
        parts.append(Part([Window(each.start + start, each.new + start, each.stop + start) for each in plan], stop))
    return parts


def chunks_of(group: list[Window], stop: int) -> Tensor:
    """Chunk indices int64 `(N, W)` of N equally long windows; from `stop` on its last chunk stands for padding."""
    return torch.stack([torch.arange(window.start, window.stop) for window in group]).clamp(max=stop - 1)


def side_by_side(plan: list[Window], batch: int, max_rows: int) -> list[list[Window]]:
    """The plan in groups that may be written at once: windows that see no other, as many as make `max_rows`."""
    if any(window.start < window.new for window in plan):
        return [[window] for window in plan]
    num = max(1, max_rows // batch)
    return [plan[first : first + num] for first in range(0, len(plan), num)]
