"""A placeholder task for corpora of weights alone."""

from __future__ import annotations

import torch

from raywgen.tasks.base import Inputs, Task
from raywgen.weights import Condition

BLANK = "blank"


def blank_task() -> Task:
    """Builds a task of one sample with one zero and no test samples; its recipe's `instruction` says what is known."""
    return Task(
        id=BLANK,
        instruction="",
        recipe={"name": BLANK},
        train_inputs=Inputs(torch.zeros(1, 1)),
        train_y_S=torch.zeros(1, dtype=torch.int64),
        test_inputs=Inputs(torch.zeros(0, 1)),
        test_y_S=torch.zeros(0, dtype=torch.int64),
        num_classes=1,
    )


def blank_condition(instruction: str) -> Condition:
    """Returns the condition, B = 1, for a generator of weights alone, which knows only names of networks."""
    task = blank_task()
    return Condition(
        instructions=(instruction,),
        samples_BSF=task.train_x_SF.unsqueeze(0),
        labels_BS=task.train_y_S.unsqueeze(0),
    )
