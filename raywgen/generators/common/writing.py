"""Writes networks by a denoiser: all at once, or window by window where they are longer than one.

Shape letters beyond the legend in `raywgen.weights`: Z values of a denoised state, X values of a window. Here N counts
windows of a network that are written at once, and R rows, of all networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from raywgen.generators.common.denoisers import Denoiser, Place
from raywgen.generators.common.network import MAX_ROWS
from raywgen.weights import Condition, KeyedNoise, Layout

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
    """
    plan = denoiser.all_windows(layout)
    if plan is None:
        rows = Rows(condition_embedding, noise, None, denoiser.num_states(layout))
        return denoiser.decode(follow(rows), condition, layout)
    B, done, parts = len(condition), 0, []
    device = condition_embedding.device
    for index_N in torch.arange(len(plan.first_B)).split(max(1, max_rows // B)):
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
