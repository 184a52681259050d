"""Few-shot episodes: small classification tasks drawn from the classes of one data set.

An episode depends on (seed, index) alone, so that any number of workers draw the same ones.

Shape legend: S samples, C channels, H height, W width, B episodes, N classes of an episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raywgen.tasks.base import TaskError
from raywgen.tasks.images import ImageData

SPLITS = ("train", "validation", "test")
_QUARTER_TURNS = 4
_LOW_64_BITS = (1 << 64) - 1


def class_groups(data: ImageData, column: str) -> tuple[str, ...]:
    """Returns the group of each class, such as the alphabet of each character, from a column of the data.

    Raises:
        TaskError: There is no such column, a class has images of two groups, or has none.
    """
    if column not in data.columns:
        raise TaskError(f"'{data.name}' has no column '{column}'; it has: {', '.join(data.columns) or 'none'}")
    group_of: dict[int, str] = {}
    for label, value in zip(data.y_S.tolist(), data.columns[column], strict=True):
        if group_of.setdefault(label, str(value)) != str(value):
            name = data.class_names[label]
            raise TaskError(f"class '{name}' has '{column}' {group_of[label]} and {value}; group by another column")
    missing = next((label for label in range(len(data.class_names)) if label not in group_of), None)
    if missing is not None:
        raise TaskError(f"class '{data.class_names[missing]}' of '{data.name}' has no images; load without limit=")
    return tuple(group_of[label] for label in range(len(data.class_names)))


def split_classes(
    groups: Sequence[str], shares: Sequence[float] = (0.6, 0.2, 0.2), *, seed: int
) -> dict[str, tuple[int, ...]]:
    """Splits classes for meta-training, validation and testing, so that no group is in two of them.

    Args:
        groups: The group of each class: `data.class_names` to split class by class, `class_groups(data, "alphabet")`
            to keep alphabets whole.
        shares: Shares of the groups for `train`, `validation` and `test`; one above 0 gets at least one group.
        seed: Seed of the split; not negative.

    Returns:
        Ascending classes (places in `groups`) for each of `train`, `validation` and `test`.

    Raises:
        TaskError: The shares are not three that add up to 1, or there are fewer groups than shares above 0.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6 or seed < 0:
        raise TaskError(f"shares={list(shares)}, seed={seed}: give three shares that add up to 1, and nothing negative")
    names = sorted(set(groups))
    counts = [int(share > 0) for share in shares]
    if len(names) < sum(counts):
        raise TaskError(f"{len(names)} groups cannot fill {sum(counts)} splits; give more classes, or a share of 0")
    while sum(counts) < len(names):
        lacking = [
            share * len(names) - count if share > 0 else -np.inf for share, count in zip(shares, counts, strict=True)
        ]
        counts[int(np.argmax(lacking))] += 1
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(names))
    split_of = dict(zip((names[place] for place in order), np.repeat(SPLITS, counts).tolist(), strict=True))
    return {split: tuple(c for c, group in enumerate(groups) if split_of[group] == split) for split in SPLITS}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Episode:
    """One N-way task, or B of them with a leading dimension B throughout.

    Attributes:
        support_x: Pixels to learn from, uint8 `(N * shot, C, H, W)`, class after class.
        support_y: Their labels, int64 `(N * shot,)` from 0 to N - 1.
        query_x: Pixels to be judged on, uint8 `(N * num_query, C, H, W)`, class after class; no support image is
            among them.
        query_y: Their labels, int64 `(N * num_query,)`.
        classes: The class that each label stands for, int64 `(N,)`: that of the data, plus the number of classes for
            each quarter turn.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    classes: Tensor


class EpisodeSampler:
    """Draws episodes from some classes of a data set.

    Args:
        data: Images; with `rotations`, square ones.
        classes: Classes of the data to draw from.
        way: Classes of an episode.
        shot: Support images of each.
        num_query: Query images of each.
        seed: Seed; with an index it decides an episode.
        rotations: Whether each class turned by 90, 180 and 270 degrees is a class of its own, as usual on Omniglot.

    Raises:
        TaskError: Classes or images do not suffice, or a class is not of the data or given twice.
    """

    def __init__(
        self,
        data: ImageData,
        classes: Sequence[int],
        *,
        way: int,
        shot: int,
        num_query: int,
        seed: int,
        rotations: bool = False,
    ) -> None:
        self._data = data
        self._classes = [int(number) for number in classes]
        self._way, self._shot, self._num_query = way, shot, num_query
        self._seed = seed
        self._num_turns = _QUARTER_TURNS if rotations else 1
        self._check()
        by_class_S = torch.argsort(data.y_S, stable=True)
        counts = torch.bincount(data.y_S, minlength=len(data.class_names))
        self._rows = [rows.numpy() for rows in by_class_S.split(counts.tolist())]
        self._check_images()

    def episode(self, index: int) -> Episode:
        """Returns the episode of an index; indices may come in any order.

        Raises:
            TaskError: The index is not from 0 to 2**64 - 1.
        """
        if not 0 <= index <= _LOW_64_BITS:
            raise TaskError(f"index={index}: ask for an episode from 0 to 2**64 - 1")
        # Seed and index are the key of a counter-based generator: no stream runs into another one's.
        key = np.array([self._seed & _LOW_64_BITS, index], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        universe = len(self._classes) * self._num_turns
        turns_N, places_N = np.divmod(rng.choice(universe, self._way, replace=False), len(self._classes))
        classes_N = np.asarray(self._classes)[places_N]
        each = self._shot + self._num_query
        rows = [rng.choice(self._rows[number], each, replace=False) for number in classes_N]
        return Episode(
            support_x=self._pixels([row[: self._shot] for row in rows], turns_N),
            support_y=torch.arange(self._way).repeat_interleave(self._shot),
            query_x=self._pixels([row[self._shot :] for row in rows], turns_N),
            query_y=torch.arange(self._way).repeat_interleave(self._num_query),
            classes=torch.from_numpy(classes_N + turns_N * len(self._data.class_names)),
        )

    def batch(self, first: int, num: int) -> Episode:
        """Returns the episodes `first` to `first + num - 1`, stacked.

        Raises:
            TaskError: `num` is below 1.
        """
        if num < 1:
            raise TaskError(f"num={num}: ask for at least one episode")
        episodes = [self.episode(index) for index in range(first, first + num)]
        return Episode(
            support_x=torch.stack([episode.support_x for episode in episodes]),
            support_y=torch.stack([episode.support_y for episode in episodes]),
            query_x=torch.stack([episode.query_x for episode in episodes]),
            query_y=torch.stack([episode.query_y for episode in episodes]),
            classes=torch.stack([episode.classes for episode in episodes]),
        )

    def _pixels(self, rows: Sequence[np.ndarray], turns_N: np.ndarray) -> Tensor:
        pixels = [self._data.x_SCHW[torch.from_numpy(row)] for row in rows]
        return torch.cat([torch.rot90(x, int(turn), (-2, -1)) for x, turn in zip(pixels, turns_N, strict=True)])

    def _check(self) -> None:
        num_classes = len(self._data.class_names)
        if min(self._way, self._shot, self._num_query) < 1:
            raise TaskError(f"way={self._way}, shot={self._shot}, num_query={self._num_query}: give positive numbers")
        if len(set(self._classes)) < len(self._classes) or not set(self._classes) <= set(range(num_classes)):
            raise TaskError(f"classes={self._classes}: give different ones from 0 to {num_classes - 1}")
        universe = len(self._classes) * self._num_turns
        if self._way > universe:
            raise TaskError(
                f"way={self._way}: there are {universe} classes to draw from; lower it or give more classes"
            )
        height, width = self._data.x_SCHW.shape[-2:]
        if self._num_turns > 1 and height != width:
            raise TaskError(f"rotations=True: images are {height}x{width}; load square ones with size=")

    def _check_images(self) -> None:
        each = self._shot + self._num_query
        for number in self._classes:
            if len(self._rows[number]) < each:
                raise TaskError(
                    f"class '{self._data.class_names[number]}' of '{self._data.name}' has {len(self._rows[number])} "
                    f"images, fewer than shot={self._shot} and num_query={self._num_query} need; lower them or leave "
                    "the class out"
                )
