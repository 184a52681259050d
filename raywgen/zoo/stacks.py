"""Trains one stack of a zoo and writes its checkpoints as a shard.

Shape letters beyond the legend in `raywgen.weights`: N networks of a stack, K recorded steps, P packed bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from raywgen.corpus import CheckpointFacts, Shard, write_shard
from raywgen.corpus.facts import FactValue
from raywgen.corpus.statistics import LayoutStatistics
from raywgen.tasks import FitData, OnStep, Recorded, Task, build_network, build_task, fit, repeat_state
from raywgen.tasks.text_sets import paths_of
from raywgen.weights import Layout
from raywgen.zoo.config import ZooConfig
from raywgen.zoo.measure import measure
from raywgen.zoo.plan import Start, ZooStack, initial_state

_UNKNOWN = float("nan")
_DIGITS = ("raywgen zoo on scikit-learn's digits", "CC-BY-4.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedStack:
    """The shards and facts of a trained stack.

    Attributes:
        shard: Shard of the checkpoints; None if all networks diverged.
        optimizer_shard: Shard of the optimiser's state, if it is stored.
        optimizer_layout: Layout of the optimiser's state.
        statistics: Statistics of the shard.
        diverged: Ids of trajectories that were dropped because weights or loss of a recorded step are not finite.
    """

    shard: Shard | None
    optimizer_shard: Shard | None = None
    optimizer_layout: Layout | None = None
    statistics: LayoutStatistics | None = None
    diverged: tuple[str, ...] = field(default=())


def train_stack(stack: ZooStack, config: ZooConfig, root: str, on_step: OnStep | None = None) -> TrainedStack:
    """Trains all networks of a stack on one thread of this process and writes their shard.

    Args:
        stack: The stack to train.
        config: The recipe.
        root: Folder of the corpus.
        on_step: Called after every step, as `fit` does.

    Raises:
        CorpusError: The shard cannot be written.
    """
    torch.set_num_threads(1)
    tasks = [build_task(spec.task_recipe) for spec in stack.trajectories]
    return write_stack(stack, tasks, fit_networks(stack, config, tasks, on_step), root)


def fit_networks(
    stack: ZooStack, config: ZooConfig, tasks: list[Task], on_step: OnStep | None = None
) -> list[Recorded]:
    """Trains the networks of a stack and returns them at every step of `config.checkpoint_steps`."""
    recipe = stack.start.network.recipe
    if stack.start.kind == "own":
        states = [initial_state(recipe, spec.start_seed) for spec in stack.trajectories]
        begin = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    else:
        begin = repeat_state(stack.start.state, len(tasks))
    return fit(
        build_network(recipe),
        Recorded(step=0, state_N=begin),
        training_data(tasks),
        stack.fit,
        order_seeds=[spec.order_seed for spec in stack.trajectories],
        record_steps=config.checkpoint_steps,
        execution=stack.execution,
        keep_optimizer=config.keep_optimizer,
        on_step=on_step,
    )


def write_stack(stack: ZooStack, tasks: list[Task], recorded: list[Recorded], root: str) -> TrainedStack:
    """Measures trained networks and writes those that did not diverge.

    Args:
        stack: N trajectories.
        tasks: N tasks.
        recorded: The networks at K steps.
        root: Folder of the corpus.
    """
    loss_KN, accuracy_KN = _measure(stack, tasks, recorded)
    layout = stack.start.network.layout
    kept_N = loss_KN.isfinite().all(dim=0)
    for record in recorded:
        # Only generated tensors: masks hold infinities by design.
        for tensor in (record.state_N[spec.name] for spec in layout.generated):
            kept_N &= tensor.isfinite().reshape(len(tensor), -1).all(dim=1)
    facts, packed = [], []
    optimizer: list[tuple[CheckpointFacts, dict[str, Tensor]]] = []
    for k, record in enumerate(recorded):
        for n in kept_N.nonzero().flatten().tolist():
            row = _facts(stack, n, tasks[n].id, record.step, float(loss_KN[k, n]), float(accuracy_KN[k, n]))
            facts.append(row)
            packed.append(layout.pack({name: tensor[n] for name, tensor in record.state_N.items()}))
            if record.optimizer_N:
                optimizer.append((row, {name: tensor[n] for name, tensor in record.optimizer_N.items()}))
    diverged = tuple(trajectory_id_of(stack, n, tasks[n].id) for n in (~kept_N).nonzero().flatten().tolist())
    if not facts:
        return TrainedStack(shard=None, diverged=diverged)
    packed_NP = torch.stack(packed)
    optimizer_shard, optimizer_layout = _write_optimizer(stack, optimizer, root)
    return TrainedStack(
        shard=write_shard(root, stack.name, layout, facts, packed_NP),
        optimizer_shard=optimizer_shard,
        optimizer_layout=optimizer_layout,
        statistics=LayoutStatistics.measure(layout, packed_NP),
        diverged=diverged,
    )


def write_start(start: Start, root: str) -> Shard:
    """Writes the start that networks share itself, a checkpoint of the split "base"."""
    source, licence = _DIGITS
    facts = CheckpointFacts(
        checkpoint_id=start.checkpoint_id,
        architecture=start.network.name,
        trajectory_id=start.checkpoint_id,
        task_id=None,
        layout_id=start.network.layout.id,
        step=0,
        split="base",
        start=start.kind,
        base_id=None,
        start_seed=start.seed,
        order_seed=0,
        optimizer="none",
        learning_rate=0.0,
        train_loss=_UNKNOWN,
        test_accuracy=_UNKNOWN,
        source=source,
        licence=licence,
    )
    layout = start.network.layout
    return write_shard(root, f"{start.network.name}-base", layout, [facts], layout.pack(start.state).unsqueeze(0))


def _write_optimizer(
    stack: ZooStack, kept: list[tuple[CheckpointFacts, dict[str, Tensor]]], root: str
) -> tuple[Shard | None, Layout | None]:
    """Writes optimiser tensors as checkpoints of a layout of their own, in the split "optimizer"."""
    if not kept:
        return None, None
    layout = Layout.from_state_dict(kept[0][1])
    facts = [
        replace(
            row,
            checkpoint_id=f"{row.checkpoint_id}/optimizer",
            layout_id=layout.id,
            split="optimizer",
            architecture=f"{row.architecture}/{stack.fit.optimizer}",
        )
        for row, _ in kept
    ]
    packed_NP = torch.stack([layout.pack(tensors) for _, tensors in kept])
    return write_shard(root, f"{stack.name}-optimizer", layout, facts, packed_NP), layout


def training_data(tasks: list[Task]) -> FitData:
    """Returns the training samples of N networks, one task each."""
    labels_NS = torch.stack([task.train_y_S for task in tasks])
    return FitData.joined([task.train_inputs for task in tasks], labels_NS)


def _measure(stack: ZooStack, tasks: list[Task], recorded: list[Recorded]) -> tuple[Tensor, Tensor]:
    """Returns balanced training loss and balanced test accuracy, `(K, N)` each."""
    module = build_network(stack.start.network.recipe).eval()
    test_y_NS = torch.stack([task.test_y_S for task in tasks])
    train, test = training_data(tasks), FitData.joined([task.test_inputs for task in tasks], test_y_NS)
    pairs = [measure(module, record.state_N, train, test, stack.execution) for record in recorded]
    return torch.stack([loss for loss, _ in pairs]), torch.stack([accuracy for _, accuracy in pairs])


def trajectory_id_of(stack: ZooStack, n: int, task_id: str) -> str:
    """Returns the trajectory id of the n-th network."""
    return f"{_prefix(stack)}/{task_id}/{stack.trajectories[n].trajectory}"


def _prefix(stack: ZooStack) -> str:
    """Returns the name of the architecture, with the optimiser where a zoo has several."""
    name = stack.start.network.name
    return f"{name}-{stack.fit.label}" if stack.name.startswith(f"{name}-{stack.fit.label}-") else name


def _facts(stack: ZooStack, n: int, task_id: str, step: int, loss: float, accuracy: float) -> CheckpointFacts:
    spec, start, one = stack.trajectories[n], stack.start, stack.fit
    trajectory_id = trajectory_id_of(stack, n, task_id)
    own = start.kind == "own"
    seen = spec.task_recipe.get("task", spec.task_recipe)
    on_digits = seen["name"] == "digits-subset"
    source, licence = _DIGITS if on_digits else (f"raywgen zoo on {', '.join(paths_of(seen['path']))}", "unknown")
    more: dict[str, FactValue] = {
        "sam_rho": one.sam.rho,
        "sam_adaptive": one.sam.adaptive,
        "momentum": one.momentum if one.optimizer == "sgd" else 0.0,
        "weight_decay": one.weight_decay,
        "schedule": one.schedule,
        "augment": one.augment,
        "batch_size": one.batch_size,
        "num_steps": one.num_steps,
        "loss": one.loss,
        "execution": stack.execution,
        "stack": stack.name,
    }
    return CheckpointFacts(
        checkpoint_id=f"{trajectory_id}/step-{step}",
        architecture=start.network.name,
        trajectory_id=trajectory_id,
        task_id=task_id,
        layout_id=start.network.layout.id,
        step=step,
        split=spec.split,
        start=start.kind,
        base_id=None if own else start.checkpoint_id,
        start_seed=spec.start_seed if own else start.seed,
        order_seed=spec.order_seed,
        optimizer=one.optimizer,
        learning_rate=one.learning_rate,
        train_loss=loss,
        test_accuracy=accuracy,
        source=source,
        licence=licence,
        more=more,
    )
