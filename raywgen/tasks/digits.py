"""scikit-learn's 1,797 real handwritten digits, and tasks that ask for subsets of their labels.

The split of images is fixed: 1,200 for training and 597 for testing, the same for every task and seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raywgen.tasks.base import Inputs, Task, TaskError

NUM_TRAIN_IMAGES = 1200
_SPLIT_SEED = 0
_SUBSET_SIZES = range(2, 9)


@lru_cache(maxsize=1)
def digit_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns train images `(1200, 64)` in [0, 1], train digits `(1200,)`, test images `(597, 64)`, test digits."""
    # Every worker imports this module, and importing scikit-learn takes longer than importing torch.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data, target = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(data, dtype=np.float32) / 16)
    digits = torch.from_numpy(np.asarray(target, dtype=np.int64))
    train, test = train_test_split(
        np.arange(len(digits)), train_size=NUM_TRAIN_IMAGES, stratify=target, random_state=_SPLIT_SEED
    )
    return images[train], digits[train], images[test], digits[test]


@lru_cache(maxsize=1)
def _inputs() -> tuple[Inputs, Inputs]:
    train_x, _, test_x, _ = digit_images()
    return Inputs(train_x), Inputs(test_x)


def digits_subset(labels: Sequence[int]) -> Task:
    """Builds the task "Is the digit one of these labels?"; class 1 says yes.

    Raises:
        TaskError: A label is no digit, is given twice, or none or all ten are given.
    """
    chosen = sorted(labels)
    if len(set(chosen)) != len(chosen) or not set(chosen) < set(range(10)) or not chosen:
        raise TaskError(f"labels={list(labels)}: give between one and nine different digits from 0 to 9")
    _, train_digits, _, test_digits = digit_images()
    train, test = _inputs()
    member = torch.zeros(10, dtype=torch.int64)
    member[chosen] = 1
    return Task(
        id="digits/" + "-".join(map(str, chosen)),
        instruction=f"Is the digit one of {', '.join(map(str, chosen))}?",
        recipe=subset_recipe(chosen),
        train_inputs=train,
        train_y_S=member[train_digits],
        test_inputs=test,
        test_y_S=member[test_digits],
        num_classes=2,
    )


def subset_recipe(labels: Sequence[int]) -> dict[str, Any]:
    """Returns the recipe that `build_task` takes."""
    return {"name": "digits-subset", "labels": list(labels)}


def draw_subset_tasks(
    *, num_seen: int, num_validation: int, num_unseen: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Draws recipes of label-subset tasks, split by task into `seen`, `validation` and `unseen`.

    A held-out task takes its complement (the same question asked the other way round) out of all other splits.

    Raises:
        TaskError: More tasks are asked for than there are subsets of two to eight digits.
    """
    wanted = {"unseen": num_unseen, "validation": num_validation, "seen": num_seen}
    subsets = [s for size in _SUBSET_SIZES for s in itertools.combinations(range(10), size)]
    random.Random(seed).shuffle(subsets)
    owner: dict[tuple[int, ...], str] = {}
    drawn: dict[str, list[tuple[int, ...]]] = {split: [] for split in wanted}
    for subset in subsets:
        other = tuple(digit for digit in range(10) if digit not in subset)
        for split, number in wanted.items():
            reserved = owner.get(subset) or owner.get(other)
            if len(drawn[split]) == number or reserved not in (None, split):
                continue
            drawn[split].append(subset)
            if split != "seen":
                owner[subset] = split
            break
    for split, number in wanted.items():
        if len(drawn[split]) < number:
            raise TaskError(
                f"num_{split}_tasks={number}: only {len(drawn[split])} of the {len(subsets)} label subsets are "
                "left after those held out and their complements; ask for fewer"
            )
    return {split: [subset_recipe(subset) for subset in chosen] for split, chosen in drawn.items()}
