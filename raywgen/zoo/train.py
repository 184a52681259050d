"""Trains a zoo over parallel Ray tasks, one stack of networks each, straight into a corpus.

Shape legend: N networks of a stack, P packed bytes.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from raywgen.corpus import (
    CheckpointFacts,
    Corpus,
    CorpusError,
    MissingFileError,
    NetworkFacts,
    Shard,
    TaskFacts,
    commit_corpus,
    write_shard,
)
from raywgen.tasks import (
    balanced_accuracy,
    build_network,
    build_task,
    draw_condition,
    draw_subset_tasks,
    fit_stack,
    network_name,
    repeat_state,
    stacked_logits,
)
from raywgen.weights import KeyedNoise, Layout, StateDict
from raywgen.zoo.config import ZooConfig

Progress = Callable[[int, int], None]
_SOURCE = "raywgen zoo: scikit-learn digits"
_LICENCE = "CC0-1.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One network to train: its task, split, and seed of data order."""

    task_recipe: dict[str, Any]
    split: str
    order_seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Networks of one architecture and one split that one Ray task trains at once."""

    name: str
    network: NetworkFacts
    base_id: str
    start: StateDict
    jobs: tuple[Job, ...]


def train_zoo(config: ZooConfig, root: str, on_progress: Progress | None = None) -> Corpus:
    """Trains all networks and commits them as a corpus; what is there already is not done again.

    Args:
        config: The recipe.
        root: Where the corpus goes, a path or URI that all nodes reach.
        on_progress: Called with the networks trained and their number.

    Raises:
        CorpusError: `root` holds a corpus of another recipe, or cannot be written.
    """
    recipe = {"zoo": dataclasses.asdict(config)}
    if (corpus := _existing(root, recipe)) is not None:
        return corpus
    task_recipes = draw_subset_tasks(
        num_seen=config.num_seen_tasks,
        num_validation=config.num_validation_tasks,
        num_unseen=config.num_unseen_tasks,
        seed=config.seed,
    )
    networks, bases, stacks = [], [], []
    for index, widths in enumerate(config.widths):
        network, start = _network(widths, config.seed + index)
        networks.append(network)
        bases.append(_write_base(root, network, start, config.seed + index))
        stacks += _stacks(config, network, start, task_recipes)
    shards = bases + _train_all(stacks, config, root, on_progress)
    summary = {"diverged": sum(len(stack.jobs) for stack in stacks) - _num_trained(shards)}
    tasks = [_task_facts(r, split, config) for split, recipes in task_recipes.items() for r in recipes]
    return commit_corpus(root, shards=shards, tasks=tasks, networks=networks, recipe={**recipe, "summary": summary})


def _existing(root: str, recipe: dict[str, Any]) -> Corpus | None:
    try:
        corpus = Corpus.open(root)
    except MissingFileError as error:
        if "manifest" in str(error):
            return None
        raise
    if corpus.manifest["recipe"].get("zoo") != recipe["zoo"]:
        raise CorpusError(f"{root} already holds a corpus of another recipe; give another folder or delete this one")
    return corpus


def _network(widths: Sequence[int], seed: int) -> tuple[NetworkFacts, StateDict]:
    recipe = {"name": "mlp", "widths": list(widths)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = build_network(recipe).state_dict()
    return NetworkFacts(name=network_name(recipe), recipe=recipe, layout=Layout.from_state_dict(start)), start


def _write_base(root: str, network: NetworkFacts, start: StateDict, seed: int) -> Shard:
    facts = CheckpointFacts(
        checkpoint_id=_base_id(network),
        trajectory_id=_base_id(network),
        task_id=None,
        layout_id=network.layout.id,
        step=0,
        split="base",
        start="shared",
        base_id=None,
        start_seed=seed,
        order_seed=0,
        optimizer="none",
        learning_rate=0.0,
        train_loss=float("nan"),
        test_accuracy=float("nan"),
        source=_SOURCE,
        licence=_LICENCE,
    )
    packed_1P = network.layout.pack(start).unsqueeze(0)
    return write_shard(root, f"{network.name}-base", network.layout, [facts], packed_1P)


def _base_id(network: NetworkFacts) -> str:
    return f"{network.name}/start"


def _stacks(
    config: ZooConfig, network: NetworkFacts, start: StateDict, task_recipes: dict[str, list[dict[str, Any]]]
) -> Iterator[Stack]:
    jobs: dict[str, list[Job]] = {}
    for task_split, recipes in task_recipes.items():
        for recipe in recipes:
            for seed in range(config.seeds_per_task):
                last = seed == config.seeds_per_task - 1
                split = ("heldout" if last else "train") if task_split == "seen" else task_split
                job = Job(task_recipe=recipe, split=split, order_seed=seed)
                jobs.setdefault(split, []).append(job)
    for split, of_split in jobs.items():
        for number, first in enumerate(range(0, len(of_split), config.stack_size)):
            yield Stack(
                name=f"{network.name}-{split}-{number:03d}",
                network=network,
                base_id=_base_id(network),
                start=start,
                jobs=tuple(of_split[first : first + config.stack_size]),
            )


def _train_all(stacks: list[Stack], config: ZooConfig, root: str, on_progress: Progress | None) -> list[Shard]:
    remote = ray.remote(num_cpus=1)(_train_stack)
    waiting = {remote.remote(stack, config, root): stack for stack in stacks}
    total = sum(len(stack.jobs) for stack in stacks)
    shards: dict[str, Shard] = {}
    done = 0
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        stack = waiting.pop(ready)
        shards[stack.name] = ray.get(ready)
        done += len(stack.jobs)
        if on_progress is not None:
            on_progress(done, total)
    return [shards[stack.name] for stack in stacks]


def _num_trained(shards: list[Shard]) -> int:
    trajectories = {row["trajectory_id"] for shard in shards for row in shard.facts if row["split"] != "base"}
    return len(trajectories)


def _train_stack(stack: Stack, config: ZooConfig, root: str) -> Shard:
    """Trains one stack and writes its shard; networks that diverged are left out."""
    torch.set_num_threads(1)
    tasks = [build_task(job.task_recipe) for job in stack.jobs]
    module = build_network(stack.network.recipe)
    fit = fit_stack(
        module,
        repeat_state(stack.start, len(tasks)),
        tasks[0].train_x_SF,
        torch.stack([task.train_y_S for task in tasks]),
        record_steps=config.checkpoint_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        order_seeds=[_order_seed(config, task.id, job) for task, job in zip(tasks, stack.jobs, strict=True)],
    )
    facts, packed = [], []
    test_y_NS = torch.stack([task.test_y_S for task in tasks])
    for step, state in zip(config.checkpoint_steps, fit.states, strict=True):
        accuracy_N = balanced_accuracy(stacked_logits(module, state, tasks[0].test_x_SF), test_y_NS)
        for index, (task, job) in enumerate(zip(tasks, stack.jobs, strict=True)):
            network = {name: tensor[index] for name, tensor in state.items()}
            if not all(bool(tensor.isfinite().all()) for tensor in network.values()):
                continue
            facts.append(_facts(stack, config, task.id, job, step, float(fit.loss_N[index]), float(accuracy_N[index])))
            packed.append(stack.network.layout.pack(network))
    packed_NP = torch.stack(packed) if packed else torch.empty(0, stack.network.layout.num_bytes, dtype=torch.uint8)
    return write_shard(root, stack.name, stack.network.layout, facts, packed_NP)


def _order_seed(config: ZooConfig, task_id: str, job: Job) -> int:
    return zlib.crc32(f"{config.seed}/{task_id}/{job.order_seed}".encode())


def _facts(
    stack: Stack, config: ZooConfig, task_id: str, job: Job, step: int, loss: float, accuracy: float
) -> CheckpointFacts:
    trajectory = f"{stack.network.name}/{task_id}/seed{job.order_seed}"
    return CheckpointFacts(
        checkpoint_id=f"{trajectory}/step{step}",
        trajectory_id=trajectory,
        task_id=task_id,
        layout_id=stack.network.layout.id,
        step=step,
        split=job.split,
        start="shared",
        base_id=stack.base_id,
        start_seed=config.seed,
        order_seed=job.order_seed,
        optimizer="adam",
        learning_rate=config.learning_rate,
        train_loss=loss,
        test_accuracy=accuracy,
        source=_SOURCE,
        licence=_LICENCE,
    )


def _task_facts(recipe: dict[str, Any], split: str, config: ZooConfig) -> TaskFacts:
    task = build_task(recipe)
    noise = KeyedNoise(config.seed, torch.tensor([zlib.crc32(task.id.encode())]))
    shown = draw_condition([task], config.num_condition_samples, noise)
    samples_SF: Tensor = shown.samples_BSF[0]
    return TaskFacts(
        task_id=task.id,
        instruction=task.instruction,
        split=split,
        recipe=task.recipe,
        samples_SF=samples_SF,
        labels_S=shown.labels_BS[0],
    )
