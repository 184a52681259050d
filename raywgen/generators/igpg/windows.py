"""Cuts a network's chunks into the windows that the prior sees at once (IGPG, section 3, generation).

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network. Here N counts windows.
"""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True, slots=True)
class WindowGroup:
    """Windows that are written at once.

    Attributes:
        windows: The windows, equally long.
        first: Number of the first of them among all windows of the network, which keys their noise.
        part_stop: End of their part, beyond which chunks are padding.
        longest_tail: Most chunks of earlier windows that a window of their part sees.
        is_header: Whether they write the header, which all windows of the other part read.
    """

    windows: list[Window]
    first: int
    part_stop: int
    longest_tail: int
    is_header: bool

    @property
    def num_tail(self) -> int:
        """Number of chunks that each window sees and does not write."""
        return self.windows[0].new - self.windows[0].start

    @property
    def chunks(self) -> slice:
        """The chunks that the group writes."""
        return slice(self.windows[0].new, min(self.windows[-1].stop, self.part_stop))


def plan_groups(
    num_chunks: int,
    header: HeaderChunks | None,
    window: int,
    sampling: SamplingConfig,
    batch: int,
    max_rows_of: Callable[[int], int],
) -> list[WindowGroup]:
    """Returns the windows of a network in groups that are written at once, in order.

    Args:
        num_chunks: M.
        header: As in `plan_parts`.
        window: As in `plan_windows`.
        sampling: As in `plan_windows`.
        batch: Number of networks that are written at once.
        max_rows_of: Returns how many windows of a length, in chunks, are written at once at most.
    """
    groups: list[WindowGroup] = []
    first, parts = 0, plan_parts(num_chunks, header, window, sampling)
    for part in parts:
        longest_tail = max(each.new - each.start for each in part.plan)
        max_rows = max_rows_of(part.plan[0].stop - part.plan[0].start)
        is_header = len(parts) > 1 and part is parts[0]
        for windows in side_by_side(part.plan, batch, max_rows):
            groups.append(WindowGroup(windows, first, part.stop, longest_tail, is_header))
            first += len(windows)
    return groups
