"""Cuts a network's chunks into the windows that the prior sees at once (IGPG, section 3, generation).

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network. Here N counts windows.
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
    """A window sees the chunks from `start` to `stop` and writes those from `new` on.

    Where `stop` lies beyond the end of the network, or of its part, the chunks beyond that end are padding.
    """

    start: int
    new: int
    stop: int


def plan_windows(num_chunks: int, window: int, sampling: SamplingConfig) -> list[Window]:
    """Returns windows that write every chunk once, in order.

    A network that fits into one window is one window in either mode. Parallel windows are equally long: one batch.

    Args:
        num_chunks: M.
        window: Most chunks of a window; 0 for all.
        sampling: Says whether windows or single chunks are independent, and otherwise their overlap.
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
    """Consecutive chunks up to `stop`; their windows see no chunk of another part."""

    plan: list[Window]
    stop: int


def plan_parts(num_chunks: int, header: HeaderChunks | None, window: int, sampling: SamplingConfig) -> list[Part]:
    """Returns one part, or two: the header, whose scales are given to later windows, and the other chunks.

    Args:
        num_chunks: M.
        header: The header chunks, if scales are given to windows. A single window sees them and needs no second part.
        window: As in `plan_windows`.
        sampling: As in `plan_windows`.
    """
    ends = [0, num_chunks]
    if header is not None and (sampling.chunks == "independent" or 0 < window < num_chunks):
        ends.insert(1, header.num)
    parts = []
    for start, stop in pairwise(ends):
        plan = plan_windows(stop - start, window, sampling)
        parts.append(Part([Window(each.start + start, each.new + start, each.stop + start) for each in plan], stop))
    return parts


def chunks_of(group: list[Window], stop: int, device: torch.device | None = None) -> Tensor:
    """Returns chunk indices int64 `(N, W)` of N equally long windows; beyond `stop` the last chunk is repeated."""
    indices = [torch.arange(window.start, window.stop, device=device) for window in group]
    return torch.stack(indices).clamp(max=stop - 1)


def side_by_side(plan: list[Window], batch: int, max_rows: int) -> list[list[Window]]:
    """Returns the plan in groups that are written at once: independent windows, up to `max_rows` of all networks."""
    if any(window.start < window.new for window in plan):
        return [[window] for window in plan]
    num = max(1, max_rows // batch)
    return [plan[first : first + num] for first in range(0, len(plan), num)]
