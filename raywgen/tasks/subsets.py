"""Draws sets of classes, and rows with equally many of each class."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np

from raywgen.tasks.base import TaskError

_MOST_LISTED = 20_000


def draw_subsets(num_classes: int, size: int, num: int, seed: int) -> list[tuple[int, ...]]:
    """Draws `num` different sets of `size` of the classes 0 to `num_classes - 1`, each ascending, uniformly.

    A call for more sets with the same seed returns the same first ones.

    Raises:
        TaskError: There are not that many sets.
    """
    total = math.comb(num_classes, size) if 0 < size <= num_classes else 0
    if not 0 <= num <= total:
        raise TaskError(f"num={num}: there are {total} sets of {size} of {num_classes} classes; ask for at most those")
    rng = random.Random(seed)
    # Fisher-Yates over the ranks of all sets, of which only the touched ones are kept: `total` may be astronomical.
    moved: dict[int, int] = {}
    subsets = []
    for place in range(num):
        other = rng.randrange(place, total)
        subsets.append(_subset_of_rank(moved.get(other, other), num_classes, size))
        moved[other] = moved.get(place, place)
    return subsets


Groups = tuple[tuple[int, ...], tuple[int, ...]]
"""Two disjoint sets of classes, each ascending, the one with the lowest class first."""


def draw_groups(classes: Sequence[int], num: int, seed: int, containing: Sequence[int] = ()) -> list[Groups]:
    """Draws `num` different pairs of disjoint, non-empty sets of classes, uniformly.

    Args:
        classes: Classes to draw from.
        num: Number of pairs.
        seed: Seed of the draw.
        containing: Classes of which each pair has one or more; empty for no such demand.

    Raises:
        TaskError: There are not that many pairs.
    """
    free = len(classes) - len(set(containing) & set(classes))
    total = _num_groups(len(classes)) - (_num_groups(free) if containing else 0)
    if not 0 <= num <= total:
        raise TaskError(f"num={num}: there are {total} pairs of sets of {len(classes)} classes; ask for at most those")
    rng, drawn = random.Random(seed), dict[Groups, None]()
    if total <= _MOST_LISTED:
        places = itertools.product(range(3), repeat=len(classes))
        every = dict.fromkeys(groups for place in places if (groups := _groups(classes, place, containing)))
        return rng.sample(list(every), num)
    while len(drawn) < num:
        if groups := _groups(classes, [rng.randrange(3) for _ in classes], containing):
            drawn[groups] = None
    return list(drawn)


def _num_groups(num_classes: int) -> int:
    """Counts pairs of disjoint, non-empty sets: each class is in one, in the other, or in neither."""
    return (3**num_classes - 2 * 2**num_classes + 1) // 2


def _groups(classes: Sequence[int], places: Sequence[int], containing: Sequence[int]) -> Groups | None:
    """Returns the sets of classes at places 1 and 2; None where one is empty or a wanted class is missing."""
    sides = [tuple(sorted(one for one, at in zip(classes, places, strict=True) if at == side)) for side in (1, 2)]
    if not all(sides) or (containing and not {*containing} & {*sides[0], *sides[1]}):
        return None
    first, second = sorted(sides)
    return first, second


def balanced_rows(labels_S: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Chooses at most `limit` rows, ascending, with as equal numbers of each class as the data allow.

    Args:
        labels_S: Class of each row, int64.
        limit: Number of rows; all where there are fewer.
        seed: Seed of the choice; not negative.
    """
    order_S = np.random.Generator(np.random.Philox(seed)).permutation(len(labels_S))
    by_class_S = np.argsort(labels_S[order_S], kind="stable")
    ascending_S = labels_S[order_S][by_class_S]
    turn_S = np.empty_like(by_class_S)
    turn_S[by_class_S] = np.arange(len(labels_S)) - np.searchsorted(ascending_S, ascending_S)
    return np.sort(order_S[np.argsort(turn_S, kind="stable")[:limit]])


def _subset_of_rank(rank: int, num_classes: int, size: int) -> tuple[int, ...]:
    """Returns the set of this rank in the lexicographic order of all."""
    chosen: list[int] = []
    for number in range(num_classes):
        missing = size - len(chosen)
        with_it = math.comb(num_classes - number - 1, missing - 1) if missing else 0
        if rank < with_it:
            chosen.append(number)
        else:
            rank -= with_it
    return tuple(chosen)
