"""How far from every stored network one can get without learning anything, at the accuracy that a generator reaches.

Noise on stored networks and averages of them are novel too, and noise more so the more of it there is. A generator has
learned something where it lies farther from the stored networks than these do when they are as accurate as it is.

Shape legend: N networks, D values, R stored networks, G groups of stored networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.evaluation.novelty import distances
from raywgen.weights import Layout, Normalizer
from raywgen.weights.alignment import match_weights
from raywgen.weights.symmetry import Symmetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What networks of one kind come to, means over them.

    Attributes:
        accuracy: In points.
        distance: To the nearest stored network.
    """

    accuracy: float
    distance: float


def nearest_distance(
    values_ND: Tensor, stored_RD: Tensor, normalizer: Normalizer, layout: Layout, symmetry: Symmetry | None = None
) -> Tensor:
    """Of each network the distance `(N,)` to the nearest stored one.

    Args:
        values_ND: Flat vectors.
        stored_RD: Likewise.
        reference: Gives the units.
        layout: Of both.
        symmetry: Where given, the stored networks' hidden units are first brought into the order that lies closest to
            each network, so that a stored one with its units in another order is no new one.
    """
    nearest_N = distances(values_ND, stored_RD, normalizer).amin(dim=1)
    if symmetry is None:
        return nearest_N
    stored_R = layout.unflatten(stored_RD)
    matched = []
    for values_D in values_ND:
        orders = match_weights(symmetry, layout.unflatten(values_D), stored_R).orders
        rows = (layout.unflatten(stored_D) for stored_D in stored_RD)
        moved_RD = torch.stack(
            [
                layout.flatten(symmetry.permute(state, [order_RU[index] for order_RU in orders]))
                for index, state in enumerate(rows)
            ]
        )
        matched.append(distances(values_D.unsqueeze(0), moved_RD, normalizer).amin())
    # Matching maximises an inner product of raw weights, so that in these units it may end farther.
    return torch.minimum(nearest_N, torch.stack(matched))


def spread(values_ND: Tensor, normalizer: Normalizer) -> float:
    """Mean distance between two different networks of a set; 0 for one alone."""
    num = len(values_ND)
    if num < 2:
        return 0.0
    return float(distances(values_ND, values_ND, normalizer).fill_diagonal_(0).sum()) / (num * (num - 1))


def noisy(copies_ND: Tensor, level: float, normalizer: Normalizer, seed: int) -> Tensor:
    """Networks plus Gaussian noise of `level` standard deviations of each tensor; the same draw at every level."""
    draw_ND = torch.randn(copies_ND.shape, generator=torch.Generator().manual_seed(seed))
    return normalizer.denormalise(normalizer.normalise(copies_ND) + level * draw_ND)


def averages(stored_RD: Tensor, groups: Sequence[str] | None, k: int, num: int, seed: int) -> Tensor | None:
    """Means of k different stored networks, `(num, D)`.

    Args:
        stored_RD: Of which they are drawn.
        groups: Name of the group of each, to draw each mean within one group; None draws from all.
        k: Networks of a mean.
        num: Means.
        seed: Of the draw.

    Returns:
        The means; None where no group holds k.
    """
    members: dict[str, list[int]] = {}
    for index in range(len(stored_RD)):
        members.setdefault("" if groups is None else groups[index], []).append(index)
    large = [torch.tensor(found) for found in members.values() if len(found) >= k]
    if not large:
        return None
    generator = torch.Generator().manual_seed(seed)
    means = []
    for index in range(num):
        group = large[index % len(large)]
        chosen_k = group[torch.randperm(len(group), generator=generator)[:k]]
        means.append(stored_RD[chosen_k].mean(dim=0))
    return torch.stack(means)


def farthest_on_curve(accuracy: float, curve: Sequence[Reached]) -> float:
    """The largest distance at which a curve, straight between its points, is still that accurate.

    Args:
        accuracy: Wanted, in points.
        curve: In order of distance, from the stored networks themselves on.

    Returns:
        0 where no point is so accurate; the last point's distance where it still is.
    """
    for index in range(len(curve) - 1, -1, -1):
        here = curve[index]
        if here.accuracy < accuracy:
            continue
        if index == len(curve) - 1:
            return here.distance
        beyond = curve[index + 1]
        part = (here.accuracy - accuracy) / (here.accuracy - beyond.accuracy)
        return here.distance + part * (beyond.distance - here.distance)
    return 0.0


def farthest_of(accuracy: float, points: Iterable[Reached]) -> float:
    """The largest distance among those that are so accurate; 0 where none is."""
    return max((point.distance for point in points if point.accuracy >= accuracy), default=0.0)


def noise_curve(
    copies_ND: Tensor,
    levels: Sequence[float],
    normalizer: Normalizer,
    seed: int,
    reached: Callable[[Tensor], Reached],
) -> list[Reached]:
    """Copies of stored networks with more and more noise, from none on."""
    return [reached(noisy(copies_ND, level, normalizer, seed)) for level in (0.0, *sorted(levels))]
