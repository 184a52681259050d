"""A start that is good for all tasks: it is trained by the loss of all seen ones, with heads fitted to a few examples.

It is the multi-task adapter that adapters for single tasks are compared with. A zoo that begins there holds what each
task needs beyond it, and generators that are trained on that zoo write the same.

Shape letters beyond the legend in `raywgen.weights`: here B counts the tasks of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from raywgen.tasks import Task, TaskError, balanced_cross_entropy
from raywgen.tasks.base import draw_disjoint
from raywgen.tasks.fitted_head import HeadFitting, fits_head, fitted_logits
from raywgen.weights import KeyedNoise, StateDict

_TASKS_AT_ONCE, _NUM_SAMPLES = 8, 32
_BETAS, _CLIP, _FLOOR = (0.9, 0.99), 1.0, 0.05
_TASK_STREAM, _SAMPLE_STREAM = 4_000, 4_001


def meta_trained(
    module: nn.Module,
    state: StateDict,
    tasks: Sequence[Task],
    *,
    num_steps: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> StateDict:
    """Returns the start after Adam's steps on the mean loss of eight tasks each, at a rate that falls by a cosine.

    Heads are fitted to 32 training samples of a task, and judged by 32 others; where a task has fewer than 64, both are
    half of the smallest task's. The head itself stays as it is.

    Args:
        module: A network whose head is fitted; its own values are not used.
        state: The start before.
        tasks: The seen tasks.
        num_steps: Number of steps.
        learning_rate: Rate at the first step.
        seed: Keys the draws of tasks and samples.
        on_step: Called after each step with the number of steps so far.

    Raises:
        TaskError: The network's head is not fitted, or there are no tasks, or one has fewer than two samples.
    """
    if not fits_head(module):
        raise TaskError("start=meta: only a head that is fitted fits several tasks; give head: fitted, or start=shared")
    if not tasks:
        raise TaskError("start=meta: it is trained by the seen tasks; give num_seen_tasks above 0")
    head = cast(HeadFitting, module).head_names
    trained = {name: nn.Parameter(tensor.clone()) for name, tensor in state.items() if name not in head}
    # At least one, so that a task without two samples is refused by name.
    num = min(_NUM_SAMPLES, max(1, min(len(task.train_y_S) for task in tasks) // 2))
    optimizer = torch.optim.Adam(trained.values(), lr=learning_rate, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, learning_rate * _FLOOR)
    for step in range(num_steps):
        index_B = torch.arange(_TASKS_AT_ONCE) + step * _TASKS_AT_ONCE
        place_B = (KeyedNoise(seed, index_B, _TASK_STREAM).uniform(1)[:, 0] * len(tasks)).long()
        chosen = [tasks[place] for place in place_B.clamp(max=len(tasks) - 1).tolist()]
        support, query = draw_disjoint(chosen, num, num, KeyedNoise(seed, index_B, _SAMPLE_STREAM))
        state_B = {name: tensor.expand(_TASKS_AT_ONCE, *tensor.shape) for name, tensor in {**state, **trained}.items()}
        logits_BSC = fitted_logits(module, state_B, support.samples_BSF, support.labels_BS, query.samples_BSF)
        optimizer.zero_grad()
        balanced_cross_entropy(logits_BSC, query.labels_BS).mean().backward()
        nn.utils.clip_grad_norm_(trained.values(), _CLIP)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1)
    return {name: trained[name].detach() if name in trained else tensor for name, tensor in state.items()}
