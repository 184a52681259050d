"""Trains one stack of a zoo and writes what came of it as a shard.

Shape legend: N networks of a stack, K recorded steps, S samples, P packed bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.corpus import CheckpointFacts, Shard, write_shard
from raywgen.tasks import (
    FitConfig,
    FitData,
    Recorded,
    Task,
    balanced_accuracy,
    balanced_cross_entropy,
    build_network,
    build_task,
    fit,
    repeat_state,
    stacked_logits,
)
from raywgen.zoo.config import ZooConfig
from raywgen.zoo.plan import Job, Stack, Start

_SOURCE = "raywgen zoo on scikit-learn's digits"
_LICENCE = "CC-BY-4.0"
_UNKNOWN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedStack:
    """What a stack leaves.

    Attributes:
        shard: Its checkpoints; None where no network is left.
        num_diverged: Networks that were dropped whole, as weights or loss of a recorded step are not finite.
    """

    shard: Shard | None
    num_diverged: int


def train_stack(stack: Stack, config: ZooConfig, root: str) -> TrainedStack:
    """Trains all networks of a stack on this process' one thread and writes their shard.

    Raises:
        CorpusError: The shard cannot be written.
    """
    torch.set_num_threads(1)
    tasks = [build_task(job.task_recipe) for job in stack.jobs]
    recorded = fit(
        build_network(stack.start.network.recipe),
        Recorded(step=0, state_N=repeat_state(stack.start.state, len(tasks))),
        FitData(x=tasks[0].train_x_SF, labels_NS=torch.stack([task.train_y_S for task in tasks])),
        FitConfig(num_steps=config.num_steps, batch_size=config.batch_size, learning_rate=config.learning_rate),
        order_seeds=[job.order_seed for job in stack.jobs],
        record_steps=config.checkpoint_steps,
    )
    return write_stack(stack, config, tasks, [record.state_N for record in recorded], root)


def write_stack(
    stack: Stack, config: ZooConfig, tasks: list[Task], states_N: list[dict[str, Tensor]], root: str
) -> TrainedStack:
    """Measures trained networks and writes those that did not diverge.

    Args:
        stack: N jobs.
        config: Its K `checkpoint_steps` are the steps of the states.
        tasks: N tasks, which share their inputs.
        states_N: K stacked `state_dict`s.
        root: Of the corpus.
    """
    loss_KN, accuracy_KN = _measure(stack, tasks, states_N)
    kept_N = loss_KN.isfinite().all(dim=0)
    for state in states_N:
        for tensor in state.values():
            kept_N &= tensor.isfinite().flatten(1).all(dim=1)
    layout = stack.start.network.layout
    facts, packed = [], []
    for k, (step, state) in enumerate(zip(config.checkpoint_steps, states_N, strict=True)):
        for n in kept_N.nonzero().flatten().tolist():
            job, loss, accuracy = stack.jobs[n], float(loss_KN[k, n]), float(accuracy_KN[k, n])
            facts.append(_facts(stack.start, job, tasks[n].id, step, config.learning_rate, loss, accuracy))
            packed.append(layout.pack({name: tensor[n] for name, tensor in state.items()}))
    num_diverged = len(tasks) - int(kept_N.sum())
    if not facts:
        return TrainedStack(shard=None, num_diverged=num_diverged)
    return TrainedStack(
        shard=write_shard(root, stack.name, layout, facts, torch.stack(packed)), num_diverged=num_diverged
    )


def write_start(start: Start, root: str) -> Shard:
    """Writes the shared start itself, a checkpoint of the split "base"."""
    facts = CheckpointFacts(
        checkpoint_id=start.checkpoint_id,
        architecture=start.network.name,
        trajectory_id=start.checkpoint_id,
        task_id=None,
        layout_id=start.network.layout.id,
        step=0,
        split="base",
        start="shared",
        base_id=None,
        start_seed=start.seed,
        order_seed=0,
        optimizer="none",
        learning_rate=0.0,
        train_loss=_UNKNOWN,
        test_accuracy=_UNKNOWN,
        source=_SOURCE,
        licence=_LICENCE,
    )
    layout = start.network.layout
    return write_shard(root, f"{start.network.name}-base", layout, [facts], layout.pack(start.state).unsqueeze(0))


@torch.no_grad()
def _measure(stack: Stack, tasks: list[Task], states_N: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Balanced training loss and balanced test accuracy, `(K, N)` each."""
    module = build_network(stack.start.network.recipe).eval()
    train_y_NS = torch.stack([task.train_y_S for task in tasks])
    test_y_NS = torch.stack([task.test_y_S for task in tasks])
    losses, accuracies = [], []
    for state in states_N:
        losses.append(balanced_cross_entropy(stacked_logits(module, state, tasks[0].train_x_SF), train_y_NS))
        accuracies.append(balanced_accuracy(stacked_logits(module, state, tasks[0].test_x_SF), test_y_NS))
    return torch.stack(losses), torch.stack(accuracies)


def _facts(
    start: Start, job: Job, task_id: str, step: int, learning_rate: float, loss: float, accuracy: float
) -> CheckpointFacts:
    trajectory_id = f"{start.network.name}/{task_id}/{job.trajectory}"
    return CheckpointFacts(
        checkpoint_id=f"{trajectory_id}/step-{step}",
        architecture=start.network.name,
        trajectory_id=trajectory_id,
        task_id=task_id,
        layout_id=start.network.layout.id,
        step=step,
        split=job.split,
        start="shared",
        base_id=start.checkpoint_id,
        start_seed=start.seed,
        order_seed=job.order_seed,
        optimizer="adam",
        learning_rate=learning_rate,
        train_loss=loss,
        test_accuracy=accuracy,
        source=_SOURCE,
        licence=_LICENCE,
    )
