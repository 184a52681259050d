"""Measures the novelty of noisy and averaged stored networks that are as accurate as a generator's.

Noisy copies of stored networks are novel too, the more noise the more so, and so are averages. A generator has learned
something where its networks lie farther from the stored ones than these baselines do at equal accuracy.

Shape letters beyond the legend in `raywgen.weights`: R stored networks, G groups of stored networks.
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
    """Mean accuracy and novelty of networks of one kind.

    Attributes:
        accuracy: Accuracy in percent.
        distance: Distance to the nearest stored network.
    """

    accuracy: float
    distance: float


def nearest_distance(
    values_ND: Tensor, stored_RD: Tensor, normalizer: Normalizer, layout: Layout, symmetry: Symmetry | None = None
) -> Tensor:
    """Returns the distance `(N,)` of each network to the nearest stored one.

    Args:
        values_ND: Flat vectors.
        stored_RD: Flat vectors of the stored networks.
        normalizer: Scales that are the units of distance.
        layout: Layout of both.
        symmetry: If it is given, the stored networks' hidden units are first brought into the order that lies closest
            to each network, so that a mere change of order does not count as novel.
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
    # Matching maximises an inner product of raw weights, so in these units it may increase the distance.
    return torch.minimum(nearest_N, torch.stack(matched))


def spread(values_ND: Tensor, normalizer: Normalizer) -> float:
    """Returns the mean distance between two different networks of a set; 0 for one alone."""
    num = len(values_ND)
    if num < 2:
        return 0.0
    return float(distances(values_ND, values_ND, normalizer).fill_diagonal_(0).sum()) / (num * (num - 1))


def noisy(copies_ND: Tensor, level: float, normalizer: Normalizer, seed: int) -> Tensor:
    """Adds Gaussian noise of `level` standard deviations of each tensor, the same draw at every level."""
    draw_ND = torch.randn(copies_ND.shape, generator=torch.Generator().manual_seed(seed))
    return normalizer.denormalise(normalizer.normalise(copies_ND) + level * draw_ND)


def averages(stored_RD: Tensor, groups: Sequence[str] | None, k: int, num: int, seed: int) -> Tensor | None:
    """Returns means of k different stored networks, `(num, D)`.

    Args:
        stored_RD: Networks to draw from.
        groups: Name of the group of each, to draw each mean within one group; None draws from all.
        k: Number of networks of a mean.
        num: Number of means.
        seed: Seed of the draw.

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
    """Returns the largest distance at which a curve, linear between its points, still has an accuracy.

    Args:
        accuracy: Wanted accuracy in percent.
        curve: Points in order of distance, beginning with the stored networks themselves.

    Returns:
        0 where no point is accurate enough; the last point's distance where it still is.
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
    """Returns the largest distance among the points that are accurate enough; 0 where none is."""
    return max((point.distance for point in points if point.accuracy >= accuracy), default=0.0)


def noise_curve(
    copies_ND: Tensor,
    levels: Sequence[float],
    normalizer: Normalizer,
    seed: int,
    reached: Callable[[Tensor], Reached],
) -> list[Reached]:
    """Measures copies of stored networks at rising levels of noise, beginning with none."""
    return [reached(noisy(copies_ND, level, normalizer, seed)) for level in (0.0, *sorted(levels))]
