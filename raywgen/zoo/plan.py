"""Plans which networks a zoo trains, in stacks of one architecture, optimiser and split."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from raywgen.corpus import NetworkFacts, TaskFacts
from raywgen.tasks import (
    FitConfig,
    FitData,
    Recorded,
    Task,
    TaskError,
    build_network,
    build_task,
    draw_condition,
    fit,
    network_name,
    repeat_state,
)
from raywgen.tasks.train_loop import Execution
from raywgen.weights import KeyedNoise, Layout, StateDict
from raywgen.zoo.config import ZooConfig
from raywgen.zoo.draw import draw_tasks, network_recipes
from raywgen.zoo.meta_start import meta_trained

# The last trajectory of a seen task is held out.
_HELD_OUT = {"seen": "heldout"}
_SEEN = {"seen": "train"}
_SHARED_VALUES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An architecture and the initial weights of its networks.

    Attributes:
        network: Name, recipe and layout.
        state: The shared, branched or meta start; if each network has its own start, an example of one.
        seed: Seed of the start.
        kind: `shared`, `own`, `branched` or `meta`.
    """

    network: NetworkFacts
    state: StateDict
    seed: int
    kind: str = "shared"

    @property
    def checkpoint_id(self) -> str:
        """The checkpoint id of the start in the corpus."""
        return f"{self.network.name}/start"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectorySpec:
    """One trajectory to train.

    Attributes:
        task_recipe: Task that the network learns.
        split: Split of its checkpoints.
        trajectory: Index of the trajectory among those of its task.
        order_seed: Seed of its data order.
        start_seed: Seed of its start.
    """

    task_recipe: dict[str, Any]
    split: str
    trajectory: int
    order_seed: int
    start_seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooStack:
    """Trajectories that one worker trains together, and the name of the shard that it writes."""

    name: str
    start: Start
    trajectories: tuple[TrajectorySpec, ...]
    fit: FitConfig
    execution: Execution


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooPlan:
    """All starts, stacks and tasks of a zoo, before any training."""

    starts: list[Start]
    stacks: list[ZooStack]
    tasks: list[TaskFacts]


def _execution(name: str, config: ZooConfig, executions: Mapping[str, Execution]) -> Execution:
    if name in executions:
        return executions[name]
    execution = config.execution
    assert execution != "auto", f"nothing was measured for {name}"
    return execution


def plan_zoo(
    config: ZooConfig,
    executions: Mapping[str, Execution] | None = None,
    on_start: Callable[[float], None] | None = None,
) -> ZooPlan:
    """Draws tasks, starts and data orders by the config's seed.

    Args:
        config: The recipe.
        executions: Network name -> `stacked` or `sequential`, where `config.execution` is `auto`.
        on_start: Called with the share of the meta starts' steps that is done.

    Raises:
        TaskError: The config wants more tasks than there are, or a network does not take their samples.
    """
    recipes = draw_tasks(config)
    tasks = {split: [build_task(recipe) for recipe in of_split] for split, of_split in recipes.items()}
    every = [task for of_split in tasks.values() for task in of_split]
    seen = tasks["seen"]
    starts = [
        _start(recipe, config, index, every[0], seen, on_start) for index, recipe in enumerate(network_recipes(config))
    ]
    trajectories = _trajectory_specs(config, tasks)
    stacks = [
        stack
        for start in starts
        for one in config.fits()
        for stack in _stacks(start, trajectories, config, one, _execution(start.network.name, config, executions or {}))
    ]
    return ZooPlan(
        starts=starts,
        stacks=stacks,
        tasks=[
            task_facts(task.id, task, split, config.num_condition_samples, config.seed)
            for split, of_split in tasks.items()
            for task in of_split
        ],
    )


def zoo_bytes(config: ZooConfig) -> int:
    """Returns the bytes of the weights of a zoo's checkpoints; nothing is trained for that.

    Raises:
        TaskError: The config wants more tasks than there are, or an unknown network.
    """
    num_tasks = sum(map(len, draw_tasks(config).values()))
    num_checkpoints = num_tasks * config.seeds_per_task * len(config.fits()) * len(config.checkpoint_steps)
    states = (initial_state(recipe, config.seed) for recipe in network_recipes(config))
    return num_checkpoints * sum(Layout.from_state_dict(state).num_bytes for state in states)


def initial_state(recipe: Mapping[str, object], seed: int) -> StateDict:
    """Builds a network under a seed and returns its `state_dict`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(recipe).state_dict()


def _start(
    recipe: dict[str, Any],
    config: ZooConfig,
    index: int,
    first: Task,
    seen: list[Task],
    on_start: Callable[[float], None] | None,
) -> Start:
    seed = config.seed + index
    state = initial_state(recipe, seed)
    _try(recipe, state, first)
    if config.start == "branched":
        one = replace(config.fits()[0], num_steps=config.branch_steps)
        data = FitData.joined([first.train_inputs], first.train_y_S)
        begin = Recorded(step=0, state_N=repeat_state(state, 1))
        module = build_network(recipe)
        (end,) = fit(module, begin, data, one, order_seeds=[seed], record_steps=[config.branch_steps])
        state = {name: tensor[0] for name, tensor in end.state_N.items()}
    if config.start == "meta":

        def report(step: int) -> None:
            if on_start is not None:
                on_start((index + step / config.branch_steps) / len(config.networks))

        rates = {"num_steps": config.branch_steps, "learning_rate": config.meta_rate}
        state = meta_trained(build_network(recipe).eval(), state, seen, seed=seed, on_step=report, **rates)
    network = NetworkFacts(name=network_name(recipe), recipe=recipe, layout=Layout.from_state_dict(state))
    return Start(network=network, state=state, seed=seed, kind=config.start)


def _try(recipe: dict[str, Any], state: StateDict, task: Task) -> None:
    """Runs two samples through a network, so that wrong shapes are reported before anything is trained."""
    module = build_network(recipe).eval()
    module.load_state_dict(state)
    try:
        with torch.no_grad():
            logits = module(task.train_inputs[:2])
    except RuntimeError as error:
        raise TaskError(
            f"network '{network_name(recipe)}' does not take samples of {task.train_inputs.num_features} values "
            f"({error}); give another network, tasks.size or tasks.channels"
        ) from error
    if logits.dim() != 2 or logits.shape[1] < task.num_classes:
        raise TaskError(
            f"network '{network_name(recipe)}' gives {list(logits.shape[1:])} outputs, {task.id} has "
            f"{task.num_classes} classes; give num_classes, or another width"
        )


def _trajectory_specs(config: ZooConfig, tasks: dict[str, list[Task]]) -> dict[str, list[TrajectorySpec]]:
    """Returns the trajectories by the split of their checkpoints."""
    trajectories: dict[str, list[TrajectorySpec]] = {}
    for task_split, of_split in tasks.items():
        for task in of_split:
            for trajectory in range(config.seeds_per_task):
                last = trajectory == config.seeds_per_task - 1 > 0
                split = (_HELD_OUT if last else _SEEN).get(task_split, task_split)
                order_seed = zlib.crc32(f"{config.seed}/{task.id}/{trajectory}".encode())
                spec = TrajectorySpec(
                    task_recipe=task.recipe,
                    split=split,
                    trajectory=trajectory,
                    order_seed=order_seed,
                    start_seed=zlib.crc32(f"start/{config.seed}/{task.id}/{trajectory}".encode()),
                )
                trajectories.setdefault(split, []).append(spec)
    return trajectories


def _stacks(
    start: Start, trajectories: dict[str, list[TrajectorySpec]], config: ZooConfig, one: FitConfig, execution: Execution
) -> list[ZooStack]:
    prefix = f"{start.network.name}-{one.label}" if config.optimizers else start.network.name
    stacks = []
    for split, of_split in trajectories.items():
        number = 0
        for group in _groups(of_split):
            for first in range(0, len(group), config.stack_size):
                part = tuple(group[first : first + config.stack_size])
                name = f"{prefix}-{split}-{number:03d}"
                stacks.append(ZooStack(name=name, start=start, trajectories=part, fit=one, execution=execution))
                number += 1
    return stacks


def _groups(trajectories: list[TrajectorySpec]) -> list[list[TrajectorySpec]]:
    """Groups trajectories whose samples fit in one tensor: the same samples, or equally many small ones."""
    groups: dict[object, list[TrajectorySpec]] = {}
    for spec in trajectories:
        task = build_task(spec.task_recipe)
        sizes = len(task.train_inputs), len(task.test_inputs), task.train_inputs.num_features
        small = max(sizes[:2]) * sizes[2] <= _SHARED_VALUES
        key = sizes if small else task.train_inputs
        groups.setdefault(key, []).append(spec)
    return list(groups.values())


def task_facts(task_id: str, task: Task, split: str, num_samples: int, seed: int) -> TaskFacts:
    """Describes a task as a corpus keeps it, with some of its labelled samples for conditioning.

    Args:
        task_id: Unique in the corpus.
        task: The task.
        split: `seen`, `validation` or `unseen`.
        num_samples: Number of training samples that are drawn, with replacement.
        seed: Seed of the draw.
    """
    noise = KeyedNoise(seed, torch.tensor([zlib.crc32(task_id.encode())]))
    shown = draw_condition([task], num_samples, noise)
    return TaskFacts(
        task_id=task_id,
        instruction=task.instruction,
        split=split,
        recipe=task.recipe,
        samples_SF=shown.samples_BSF[0],
        labels_S=shown.labels_BS[0],
    )
