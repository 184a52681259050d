"""Draws sets of classes, and rows with equally many of each class."""

from __future__ import annotations

import math
import random

import numpy as np

from raywgen.tasks.base import TaskError


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
