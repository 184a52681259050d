"""Parts of labelled images: some of their classes as a task of its own, or a few images of each class.

Shape legend: S samples.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from raywgen.tasks.base import TaskError

if TYPE_CHECKING:
    from raywgen.tasks.images import ImageData


def class_rows(data: ImageData, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of the images of these classes alone, in their order, and their labels: class `classes[i]` becomes class i.

    Raises:
        TaskError: A class is not of the data, is given twice or has no images, or none is given.
    """
    chosen = [int(number) for number in classes]
    num_classes = len(data.class_names)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(num_classes)):
        raise TaskError(f"classes={chosen}: give different classes from 0 to {num_classes - 1} of '{data.name}'")
    new_label = torch.full((num_classes,), -1, dtype=torch.int64)
    new_label[chosen] = torch.arange(len(chosen))
    y_S = new_label[data.y_S]
    rows_S = torch.nonzero(y_S >= 0).squeeze(1)
    counts = torch.bincount(y_S[rows_S], minlength=len(chosen)).tolist()
    if 0 in counts:
        missing = data.class_names[chosen[counts.index(0)]]
        raise TaskError(f"class '{missing}' of '{data.name}' has no images; leave it out, or load without limit=")
    return rows_S, y_S[rows_S]


def class_subset(data: ImageData, classes: Sequence[int]) -> ImageData:
    """The images of the rows that `class_rows` gives, copied; classes by their new numbers.

    Raises:
        TaskError: As `class_rows`.
    """
    rows_S, y_S = class_rows(data, classes)
    return dataclasses.replace(
        data,
        name=f"{data.name}/{'-'.join(map(str, classes))}",
        x_SCHW=data.x_SCHW[rows_S],
        y_S=y_S,
        class_names=tuple(data.class_names[number] for number in classes),
        columns={name: tuple(values[row] for row in rows_S.tolist()) for name, values in data.columns.items()},
    )


def draw_subsets(num_classes: int, size: int, num: int, seed: int) -> list[tuple[int, ...]]:
    """`num` different sets of `size` of the classes 0 to `num_classes - 1`, each ascending, all sets equally likely.

    More sets by the same seed begin with the fewer.

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
    """At most `limit` rows, ascending, as equally many of each class as there are.

    Args:
        labels_S: Class of each row, int64.
        limit: How many; all rows where there are fewer.
        seed: Decides which; not negative.
    """
    order_S = np.random.Generator(np.random.Philox(seed)).permutation(len(labels_S))
    by_class_S = np.argsort(labels_S[order_S], kind="stable")
    ascending_S = labels_S[order_S][by_class_S]
    turn_S = np.empty_like(by_class_S)
    turn_S[by_class_S] = np.arange(len(labels_S)) - np.searchsorted(ascending_S, ascending_S)
    return np.sort(order_S[np.argsort(turn_S, kind="stable")[:limit]])


def _subset_of_rank(rank: int, num_classes: int, size: int) -> tuple[int, ...]:
    """The set at this place in the lexicographic order of all."""
    chosen: list[int] = []
    for number in range(num_classes):
        missing = size - len(chosen)
        with_it = math.comb(num_classes - number - 1, missing - 1) if missing else 0
        if rank < with_it:
            chosen.append(number)
        else:
            rank -= with_it
    return tuple(chosen)
