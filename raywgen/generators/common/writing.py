"""Writes networks by a denoiser: all at once, or window by window where they are longer than one.

Shape letters beyond the legend in `raywgen.weights`: Z values of a denoised state, X values of a window. Here N counts
windows of a network that are written at once, and R rows, of all networks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from raywgen.generators.common.denoisers import Denoiser, Place
from raywgen.generators.common.network import MAX_ROWS
from raywgen.generators.pieces import Piece, joined_units
from raywgen.weights import Condition, KeyedNoise, Layout, Windows

# Whole networks use stream 0 of the samples themselves.
_WINDOW_STREAM = 3


class Rows(NamedTuple):
    """The networks, or windows of networks, that are written at once.

    Attributes:
        condition_embedding: The embedded condition of each.
        noise: Keyed noise of each.
        place: The position of the windows; None for whole networks.
        num_states: Z, the number of values of a state.
    """

    condition_embedding: Tensor
    noise: KeyedNoise
    place: Place | None
    num_states: int


def write_networks(
    denoiser: Denoiser,
    follow: Callable[[Rows], Tensor],
    condition_embedding: Tensor,
    condition: Condition,
    layout: Layout,
    noise: KeyedNoise,
    max_rows: int = MAX_ROWS,
    groups: slice = slice(None),
) -> Tensor:
    """Returns weights in generator units, `(B, D)`, differentiable in what `follow` reads.

    Windows are independent of each other given condition and position. Each has noise of its own, which depends on
    neither `max_rows` nor the other windows.

    Args:
        denoiser: The denoiser that `follow` evaluates.
        follow: Returns the states `(R, Z)` at the end of the chain.
        condition_embedding: Embedded conditions of the networks.
        condition: The conditions themselves.
        layout: Layout of the networks.
        noise: B rows of keyed noise.
        max_rows: Windows of all networks that are written at once; at least one of each network is.
        groups: The groups of windows that are written, of which `pieces_of_windows` says the values; all by default.
    """
    plan = denoiser.all_windows(layout)
    if plan is None:
        rows = Rows(condition_embedding, noise, None, denoiser.num_states(layout))
        return denoiser.decode(follow(rows), condition, layout)
    B, parts = len(condition), []
    device = condition_embedding.device
    chosen = _groups(len(plan.first_B), B, max_rows)[groups]
    done = _stop(plan, int(chosen[0][0]) - 1, layout)
    for index_N in chosen:
        N = len(index_N)
        windows = plan.take(index_N.repeat(B)).to(device)
        rows = Rows(
            condition_embedding.repeat_interleave(N, dim=0),
            noise.split(index_N + 1, _WINDOW_STREAM),
            denoiser.place(layout, windows),
            windows.num_values,
        )
        values_RX = denoiser.decode(follow(rows), condition, layout, windows)
        for index, values_BX in zip(index_N.tolist(), values_RX.unflatten(0, (B, N)).unbind(dim=1), strict=True):
            first = int(plan.first_B[index]) * plan.chunk_length
            parts.append(values_BX[:, done - first : layout.num_values - first])
            done = first + windows.num_values
    return torch.cat(parts, dim=1)


def pieces_of_windows(
    denoiser: Denoiser, layout: Layout, num: int, max_rows: int = MAX_ROWS, max_values: int = 1
) -> list[Piece]:
    """Returns pieces of whole groups of windows; a single piece of a network that is seen as a whole.

    Args:
        denoiser: The denoiser.
        layout: Layout of the networks.
        num: Number of networks that are written at once, B.
        max_rows: As in `write_networks`.
        max_values: Most values of a piece of one network; a group that has more is a piece of its own.
    """
    plan = denoiser.all_windows(layout)
    if plan is None:
        return [Piece(index=0, start=0, stop=layout.num_values)]
    stops = [0, *(_stop(plan, int(index_N[-1]), layout) for index_N in _groups(len(plan.first_B), num, max_rows))]
    runs = joined_units([stop - start for start, stop in pairwise(stops)], max_values)
    return [
        Piece(index=index, start=stops[first], stop=stops[end], units=(first, end))
        for index, (first, end) in enumerate(runs)
    ]


def _groups(num_windows: int, batch: int, max_rows: int) -> list[Tensor]:
    """Returns the numbers of the windows that are written at once."""
    return list(torch.arange(num_windows).split(max(1, max_rows // batch)))


def _stop(plan: Windows, index: int, layout: Layout) -> int:
    """Returns the end of the values of a window; 0 for the one before the first."""
    if index < 0:
        return 0
    return min(int(plan.first_B[index]) * plan.chunk_length + plan.num_values, layout.num_values)
