"""What a task is: data, and the measure by which a network is judged on it.

Shape legend: S samples, F features of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raywgen.weights import Condition, KeyedNoise


class TaskError(ValueError):
    """A task that cannot be built as asked; the message names what is wrong and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """A classification task; networks are judged by balanced accuracy on its test samples.

    Attributes:
        id: Unique name.
        instruction: The question in words, as a generator is told it.
        recipe: What `build_task` takes to build it again elsewhere.
        train_x_SF: Inputs for training, float32, flattened.
        train_y_S: Labels for training, int64.
        test_x_SF: Inputs that nothing is ever trained on.
        test_y_S: Their labels.
        num_classes: Classes of the task.
    """

    id: str
    instruction: str
    recipe: dict[str, Any]
    train_x_SF: Tensor
    train_y_S: Tensor
    test_x_SF: Tensor
    test_y_S: Tensor
    num_classes: int


def draw_condition(tasks: list[Task], num_samples: int, noise: KeyedNoise) -> Condition:
    """Instruction and labelled training samples of B tasks, drawn with replacement by keyed noise.

    Args:
        tasks: B tasks with equally long samples.
        num_samples: Labelled samples of each.
        noise: B rows.
    """
    fractions_BS = noise.uniform(num_samples)
    inputs, labels = [], []
    for task, fraction_S in zip(tasks, fractions_BS, strict=True):
        count = len(task.train_y_S)
        index_S = (fraction_S.double() * count).long().clamp_(max=count - 1)
        inputs.append(task.train_x_SF[index_S])
        labels.append(task.train_y_S[index_S])
    return Condition(
        instructions=tuple(task.instruction for task in tasks),
        samples_BSF=torch.stack(inputs),
        labels_BS=torch.stack(labels),
    )
