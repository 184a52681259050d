"""Which networks a zoo trains, in stacks of one architecture and one split."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raywgen.corpus import NetworkFacts, TaskFacts
from raywgen.tasks import Task, build_network, build_task, draw_condition, draw_subset_tasks, network_name
from raywgen.weights import KeyedNoise, Layout, StateDict
from raywgen.zoo.config import ZooConfig

# A seen task's last trajectory is kept from training; its name says so.
_HELD_OUT = {"seen": "heldout"}
_SEEN = {"seen": "train"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An architecture with the shared start of its networks."""

    network: NetworkFacts
    state: StateDict
    seed: int

    @property
    def checkpoint_id(self) -> str:
        """Of the start, in the corpus."""
        return f"{self.network.name}/start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One network to train.

    Attributes:
        task_recipe: What it learns.
        split: Of its checkpoints.
        trajectory: Its number among the task's trajectories.
        order_seed: Of its data order.
    """

    task_recipe: dict[str, Any]
    split: str
    trajectory: int
    order_seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Networks that one Ray task trains at once, and the name of the shard it writes."""

    name: str
    start: Start
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole zoo, before any training."""

    starts: list[Start]
    stacks: list[Stack]
    tasks: list[TaskFacts]


def plan_zoo(config: ZooConfig) -> Plan:
    """Draws tasks, starts and data orders by the config's seed.

    Raises:
        TaskError: More tasks are asked for than there are.
    """
    recipes = draw_subset_tasks(
        num_seen=config.num_seen_tasks,
        num_validation=config.num_validation_tasks,
        num_unseen=config.num_unseen_tasks,
        seed=config.seed,
    )
    tasks = {split: [build_task(recipe) for recipe in drawn] for split, drawn in recipes.items()}
    starts = [_start(widths, config.seed + index) for index, widths in enumerate(config.networks)]
    jobs = _jobs(config, tasks)
    return Plan(
        starts=starts,
        stacks=[stack for start in starts for stack in _stacks(start, jobs, config.stack_size)],
        tasks=[_task_facts(task, split, config) for split, drawn in tasks.items() for task in drawn],
    )


def _start(widths: Sequence[int], seed: int) -> Start:
    recipe = {"name": "mlp", "widths": list(widths)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build_network(recipe).state_dict()
    network = NetworkFacts(name=network_name(recipe), recipe=recipe, layout=Layout.from_state_dict(state))
    return Start(network=network, state=state, seed=seed)


def _jobs(config: ZooConfig, tasks: dict[str, list[Task]]) -> dict[str, list[Job]]:
    """Jobs by the split of their checkpoints."""
    jobs: dict[str, list[Job]] = {}
    for task_split, of_split in tasks.items():
        for task in of_split:
            for trajectory in range(config.seeds_per_task):
                last = trajectory == config.seeds_per_task - 1
                split = (_HELD_OUT if last else _SEEN).get(task_split, task_split)
                order_seed = zlib.crc32(f"{config.seed}/{task.id}/{trajectory}".encode())
                job = Job(task_recipe=task.recipe, split=split, trajectory=trajectory, order_seed=order_seed)
                jobs.setdefault(split, []).append(job)
    return jobs


def _stacks(start: Start, jobs: dict[str, list[Job]], stack_size: int) -> list[Stack]:
    return [
        Stack(
            name=f"{start.network.name}-{split}-{number:03d}",
            start=start,
            jobs=tuple(of_split[first : first + stack_size]),
        )
        for split, of_split in jobs.items()
        for number, first in enumerate(range(0, len(of_split), stack_size))
    ]


def _task_facts(task: Task, split: str, config: ZooConfig) -> TaskFacts:
    noise = KeyedNoise(config.seed, torch.tensor([zlib.crc32(task.id.encode())]))
    shown = draw_condition([task], config.num_condition_samples, noise)
    return TaskFacts(
        task_id=task.id,
        instruction=task.instruction,
        split=split,
        recipe=task.recipe,
        samples_SF=shown.samples_BSF[0],
        labels_S=shown.labels_BS[0],
    )
