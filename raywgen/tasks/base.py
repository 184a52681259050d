"""Defines a task: data, and the measure by which a network is judged on it.

Shape legend: B tasks, S samples, X samples of a whole data set, F features of a sample, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raywgen.weights import Condition, KeyedNoise


class TaskError(ValueError):
    """A task that cannot be built as asked; the message names what is wrong and the remedy."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """A task's inputs, as rows of those that all tasks of a data set share: only what is asked for is copied.

    Tasks with the same inputs hold the same object.

    Attributes:
        x_XF: Inputs of the data set, float32, flattened.
        rows_S: The task's rows of `x_XF`, int64; None for all of them in their order.
    """

    x_XF: Tensor
    rows_S: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_XF if self.rows_S is None else self.rows_S)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.x_XF[index if self.rows_S is None else self.rows_S[index]]

    def rows(self, index_S: Tensor) -> Tensor:
        """Returns the rows of `x_XF` that hold some of the samples."""
        return index_S if self.rows_S is None else self.rows_S[index_S]

    def part(self, index_S: Tensor) -> Inputs:
        """Returns some of the samples without copying any."""
        return Inputs(self.x_XF, self.rows(index_S))

    @property
    def num_features(self) -> int:
        """Returns the number of values of a sample."""
        return self.x_XF.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """A classification task; networks are judged by balanced accuracy on its test samples.

    Attributes:
        id: Unique name.
        instruction: The question in words, as generators read it.
        recipe: The recipe by which `build_task` builds it again elsewhere.
        train_inputs: Inputs for training.
        train_y_S: Labels for training, int64.
        test_inputs: Inputs that nothing is ever trained on.
        test_y_S: Their labels.
        num_classes: Classes of the task.
        num_condition_features: Number of a sample's first values that a generator's condition reads; 0 for all.
    """

    id: str
    instruction: str
    recipe: dict[str, Any]
    train_inputs: Inputs
    train_y_S: Tensor
    test_inputs: Inputs
    test_y_S: Tensor
    num_classes: int
    num_condition_features: int = 0

    @property
    def train_x_SF(self) -> Tensor:
        """Returns all training inputs, a copy where the task has some of the shared rows: do not keep it."""
        return self.train_inputs[:]

    @property
    def test_x_SF(self) -> Tensor:
        """Returns all test inputs, a copy where the task has some of the shared rows."""
        return self.test_inputs[:]


def draw_condition(tasks: list[Task], num_samples: int, noise: KeyedNoise) -> Condition:
    """Returns instructions and labelled training samples of B tasks, drawn with replacement by keyed noise.

    Args:
        tasks: B tasks with equally long samples.
        num_samples: Labelled samples of each.
        noise: B rows of keyed noise.
    """
    count_B1 = torch.tensor([[len(task.train_y_S)] for task in tasks])
    index_BS = (noise.uniform(num_samples).double() * count_B1).long()
    return _condition(tasks, torch.minimum(index_BS, count_B1 - 1))


def draw_disjoint(
    tasks: list[Task], num_support: int, num_query: int, noise: KeyedNoise
) -> tuple[Condition, Condition]:
    """Draws support and query sets of training samples without replacement, so that they have none in common.

    Args:
        tasks: B tasks with equally long samples.
        num_support: Support samples of each.
        num_query: Query samples of each.
        noise: B rows of keyed noise.

    Returns:
        The support sets and the query sets.

    Raises:
        TaskError: A task has fewer samples than both sets need.
    """
    counts = [len(task.train_y_S) for task in tasks]
    num, least = num_support + num_query, min(counts)
    if least < num:
        raise TaskError(
            f"task '{tasks[counts.index(least)].id}' has {least} training samples, and {num_support} for fitting with "
            f"{num_query} others for judging need {num}; give it more (tasks.limit)"
        )
    is_own_BX = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
    index_BS = noise.uniform(max(counts)).masked_fill(~is_own_BX, -1.0).topk(num, dim=1).indices
    support_BS, query_BS = index_BS.split([num_support, num_query], dim=1)
    return _condition(tasks, support_BS), _condition(tasks, query_BS)


def draw_few_shot(tasks: list[Task], shot: int, num_query: int, noise: KeyedNoise) -> tuple[Condition, Condition]:
    """Draws support sets of `shot` training samples of each class, and query sets from the other ones.

    Args:
        tasks: B tasks with equally many training samples and classes.
        shot: Support samples of each class.
        num_query: Query samples of each task, drawn with replacement; none is of its support set.
        noise: B rows of keyed noise.

    Returns:
        The support sets, class after class, and the query sets.

    Raises:
        TaskError: A task has no more than `shot` samples of a class.
    """
    if len({(len(task.train_y_S), task.num_classes) for task in tasks}) > 1:
        sizes = sorted({len(task.train_y_S) for task in tasks})
        raise TaskError(
            f"shot={shot}: tasks of one batch have {sizes[0]} to {sizes[-1]} training samples or differ in classes; "
            "give all of them equally many (tasks.limit), or shot=0"
        )
    labels_BS = torch.stack([task.train_y_S for task in tasks])
    # Labels are whole and fractions below 1, so this sorts by class and shuffles within.
    order_BS = (labels_BS + noise.uniform(labels_BS.shape[1]).double()).argsort(dim=1)
    sorted_BS = labels_BS.gather(1, order_BS)
    first_BS = torch.searchsorted(sorted_BS, sorted_BS)
    is_support_BS = torch.arange(labels_BS.shape[1]) - first_BS < shot
    num_support = shot * tasks[0].num_classes
    count_BC = torch.nn.functional.one_hot(labels_BS, tasks[0].num_classes).sum(dim=1)
    least_B = count_BC.min(dim=1).values
    if int(least_B.min()) <= shot:
        raise TaskError(
            f"shot={shot}: task '{tasks[int(least_B.argmin())].id}' has {int(least_B.min())} training samples of a "
            "class; give fewer, so that some are left for the query set"
        )
    support_BS = order_BS[is_support_BS].view(len(tasks), num_support)
    rest_BS = order_BS[~is_support_BS].view(len(tasks), -1)
    picked_BS = (noise.uniform(num_query).double() * rest_BS.shape[1]).long()
    query_BS = rest_BS.gather(1, picked_BS)
    return _condition(tasks, support_BS), _condition(tasks, query_BS)


def _condition(tasks: list[Task], index_BS: Tensor) -> Condition:
    return Condition(
        instructions=tuple(task.instruction for task in tasks),
        samples_BSF=_samples([task.train_inputs for task in tasks], index_BS),
        labels_BS=torch.stack([task.train_y_S[index_S] for task, index_S in zip(tasks, index_BS, strict=True)]),
    )


def _samples(inputs: list[Inputs], index_BS: Tensor) -> Tensor:
    each = list(zip(inputs, index_BS, strict=True))
    x_XF = inputs[0].x_XF
    if all(one.x_XF is x_XF for one in inputs):
        return x_XF[torch.stack([one.rows(index_S) for one, index_S in each])]
    return torch.stack([one[index_S] for one, index_S in each])
