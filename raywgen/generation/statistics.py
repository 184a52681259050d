"""Written networks with running statistics of their own.

Shape legend: N networks, D values, S samples, F features.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from raywgen.nn.batch_norm import reestimate_statistics
from raywgen.tasks import Task
from raywgen.weights import KeyedNoise, Layout

_STREAM = 4_000


def some_inputs(task: Task, num: int, seed: int = 0) -> Tensor:
    """Training inputs `(S, F)` of a task, drawn without replacement; all of them where there are no more."""
    noise = KeyedNoise(seed, torch.zeros(1, dtype=torch.int64), _STREAM)
    return task.train_inputs[noise.uniform(len(task.train_inputs))[0].argsort(stable=True)[:num]]


def with_new_statistics(module: nn.Module, layout: Layout, values_ND: Tensor, unlabelled_SF: Tensor) -> Tensor:
    """Networks whose statistics of batch normalisation are those of their activations on unlabelled samples, `(N, D)`.

    A generator that learned by the statistics of batches writes running ones that mean nothing.

    Args:
        module: Of the layout; its own values are not used.
        layout: Of the networks.
        values_ND: Flat vectors.
        unlabelled_SF: Inputs of the task, the more the better.
    """
    module = copy.deepcopy(module)
    rows = []
    for values_D in values_ND:
        state = layout.unflatten(values_D, counters=module.state_dict())
        module.load_state_dict(state)
        rows.append(layout.flatten(state | reestimate_statistics(module, unlabelled_SF)))
    return torch.stack(rows)
