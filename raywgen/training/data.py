"""Batches for a worker, from the record batches of a corpus.

Every worker reads the shards itself (locally they are memory-mapped, so that the workers of a node share the pages)
and puts rows into the order of the corpus' facts. So all workers agree on one global order: batch t of a stage is the
same set of checkpoints, samples and noise whatever the number of workers, and each takes its own part of it. A batch is
of one layout; layouts take turns.

Shape legend: N checkpoints, B networks of a worker's part of a batch, D values, P packed bytes, k local targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.packed_weights import refuse_packed_weights
from raywgen.generators import DataSpec
from raywgen.tasks import Task, build_network, build_task, draw_condition, draw_few_shot
from raywgen.tasks.no_task import BLANK
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer, NormalizerTable, WeightBatch

_CONDITION_STREAM = 1_000
_QUERY_STREAM = 1_001
_TRAIN, _HELD, _BASE = "train", "validation", "base"
STAGE_STREAM = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRows:
    """All checkpoints of one layout and some splits.

    Attributes:
        layout: Theirs.
        module: A network of it; an empty module where the corpus does not know how to build one.
        values_ND: Flat vectors.
        tasks: What each was trained for, N entries.
        trajectories: On which optimisation run each lies, N entries.
        steps: Optimiser step of each, N entries.
        policies: Name of the optimiser of each, N entries.
        ids: Id of each, N entries.
        targets_NAD: Local targets of each, where `trajectory_rows` made the rows.
    """

    layout: Layout
    module: nn.Module
    values_ND: Tensor
    tasks: list[Task]
    trajectories: list[str]
    steps: list[int]
    policies: list[str]
    ids: list[str]
    targets_NAD: Tensor | None = None

    def digest(self) -> str:
        """Changes with which checkpoints these are, with their order, and with what is known of each."""
        told = [
            self.layout.id,
            self.ids,
            [task.id for task in self.tasks],
            self.trajectories,
            self.steps,
            self.policies,
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class TrajectoryError(ValueError):
    """A corpus whose trajectories do not hold what a generator asks for; the message names the remedy."""


def collect_rows(blocks: Iterable[pa.Table], corpus: Corpus) -> list[LayoutRows]:
    """Sorts blocks by layout and joins each checkpoint's facts to it; rows come out in the order of shards and rows."""
    columns = [corpus.facts.column(name).to_pylist() for name in ("checkpoint_id", "task_id", "trajectory_id", "step")]
    facts_of = {name: facts for name, *facts in zip(*columns, policy_names(corpus), strict=True)}
    place_of = _places(corpus)
    values: dict[str, list[Tensor]] = {}
    ids: dict[str, list[str]] = {}
    for block in blocks:
        layout_id = block.column("layout_id")[0].as_py()
        names, form, packed_NP = corpus.checked_block(block)
        values.setdefault(layout_id, []).append(form.values(packed_NP))
        ids.setdefault(layout_id, []).extend(names)
    found = []
    for layout_id, network in corpus.networks.items():
        if layout_id not in values:
            continue
        names, values_ND = ids[layout_id], torch.cat(values[layout_id])
        order = sorted(range(len(names)), key=lambda row, names=names: place_of[names[row]])
        if order != list(range(len(names))):
            values_ND, names = values_ND[torch.tensor(order)], [names[row] for row in order]
        facts = [facts_of[name] for name in names]
        found.append(
            LayoutRows(
                layout=network.layout,
                module=build_network(network.recipe) if network.recipe else nn.Module(),
                values_ND=values_ND,
                tasks=[build_task(task_recipe(corpus, task_id, layout_id)) for task_id, *_ in facts],
                trajectories=[trajectory for _, trajectory, *_ in facts],
                steps=[step for *_, step, _ in facts],
                policies=[policy for *_, policy in facts],
                ids=names,
            )
        )
    return found


def _places(corpus: Corpus) -> dict[str, tuple[int, int]]:
    """Checkpoint id -> number of its shard and row in it: the one order that does not depend on who reads when."""
    number_of = {shard.path: number for number, shard in enumerate(corpus.shards)}
    columns = [corpus.facts.column(name).to_pylist() for name in ("checkpoint_id", "shard", "row")]
    return {name: (number_of[shard], row) for name, shard, row in zip(*columns, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRows:
    """All checkpoints that a run needs.

    Attributes:
        train: Those that it is trained on.
        held: Those that it is validated on; empty where there are none.
    """

    train: list[LayoutRows]
    held: list[LayoutRows]

    @classmethod
    def read(cls, corpus: Corpus) -> RunRows:
        """Reads a corpus in this process.

        Raises:
            CorpusError: There is nothing to train on, or a shard cannot be read.
        """
        train = collect_rows(corpus.blocks([_TRAIN]), corpus)
        has_held = corpus.select(split=_HELD).num_rows > 0
        held = collect_rows(corpus.blocks([_HELD]), corpus) if has_held else []
        return cls(train=train, held=held)

    def digest(self) -> str:
        """Changes with which checkpoints these are and with their order."""
        told = [[rows.digest() for rows in self.train], [rows.digest() for rows in self.held]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def data_digest(corpus: Corpus) -> str:
    """Changes with all that a run is trained on: values, by the shards' checksums, facts and tasks; reads no weights.

    Two corpora of equal content have the same one, wherever they lie.
    """
    shards = corpus.shards_of([_TRAIN, _HELD, _BASE])
    columns = [corpus.facts.column(name).to_pylist() for name in ("shard", "checkpoint_id", "task_id", "trajectory_id")]
    columns += [corpus.facts.column("step").to_pylist(), policy_names(corpus)]
    read = {shard.path for shard in shards}
    facts = [list(row) for row in zip(*columns, strict=True) if row[0] in read]
    recipes = {name: task.recipe for name, task in corpus.tasks.items()}
    networks = {key: network.recipe for key, network in corpus.networks.items()}
    told = [[shard.sha256 for shard in shards], facts, recipes, networks]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def task_recipe(corpus: Corpus, task_id: str | None, layout_id: str) -> dict[str, Any]:
    """Returns a checkpoint's task; without one, a placeholder whose instruction is the network's name."""
    if task_id is None or task_id not in corpus.tasks:
        return {"name": BLANK, "instruction": corpus.networks[layout_id].name}
    return corpus.tasks[task_id].recipe


def has_tasks(corpus: Corpus) -> bool:
    """Whether the corpus knows of every network how it is built, and of every checkpoint what it was trained for.

    Raises:
        CorpusError: It knows that of some checkpoints only.
    """
    splits, named = corpus.facts.column("split").to_pylist(), corpus.facts.column("task_id").to_pylist()
    known = [name in corpus.tasks for name, split in zip(named, splits, strict=True) if split != "base"]
    if any(known) and not all(known):
        raise CorpusError(
            f"{corpus.location}: {known.count(False)} of {len(known)} checkpoints have no task; filter them out, or "
            "describe all by `raywgen corpus describe`"
        )
    return all(known) and all(network.recipe for network in corpus.networks.values())


def policy_names(corpus: Corpus) -> list[str]:
    """The optimiser of every checkpoint, as a zoo names it: `adam`, `sgd-m0.9`, `adam-sam0.05`."""
    columns = [
        corpus.facts.column(name).to_pylist() if name in corpus.facts.column_names else [None] * corpus.facts.num_rows
        for name in ("optimizer", "momentum", "sam_rho", "sam_adaptive")
    ]
    return [_policy_name(*facts) for facts in zip(*columns, strict=True)]


def _policy_name(optimizer: str | None, momentum: object, rho: object, is_adaptive: object) -> str:
    """An ingested corpus may have facts of these names that are no numbers."""
    name = optimizer or ""
    if isinstance(momentum, float) and momentum:
        name += f"-m{momentum:g}"
    if isinstance(rho, float) and rho:
        name += f"-{'a' if is_adaptive else ''}sam{rho:g}"
    return name


def trajectory_rows(rows: LayoutRows, num_targets: int) -> LayoutRows:
    """One row per trajectory: its end, with k local targets at even spacing, the last one the end (Mc-Di, phase A).

    The i-th target is the checkpoint nearest to step `i M / k` of M; the start is none.

    Raises:
        TrajectoryError: A trajectory has fewer checkpoints than that, or too unevenly spaced ones.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(rows.trajectories):
        places.setdefault(name, []).append(place)
    chosen: list[list[int]] = []
    for name, of_one in places.items():
        later = sorted((place for place in of_one if rows.steps[place] > 0), key=lambda place: rows.steps[place])
        if not later:
            continue
        last = rows.steps[later[-1]]
        wanted = [last * i / num_targets for i in range(1, num_targets + 1)]
        nearest = [min(later, key=lambda place, w=w: abs(rows.steps[place] - w)) for w in wanted]
        if len(set(nearest)) < num_targets:
            raise TrajectoryError(
                f"trajectory '{name}' has checkpoints at steps {[rows.steps[place] for place in later]}: too few for "
                f"{num_targets} evenly spaced local targets; record more checkpoint_steps, or lower num_targets"
            )
        chosen.append(nearest)
    if not chosen:
        raise TrajectoryError("no trajectory has a checkpoint after its start; record more checkpoint_steps")
    index_NA = torch.tensor(chosen)
    ends = index_NA[:, -1].tolist()
    return replace(
        rows,
        values_ND=rows.values_ND[index_NA[:, -1]],
        tasks=[rows.tasks[place] for place in ends],
        trajectories=[rows.trajectories[place] for place in ends],
        steps=[rows.steps[place] for place in ends],
        policies=[rows.policies[place] for place in ends],
        ids=[rows.ids[place] for place in ends],
        targets_NAD=rows.values_ND[index_NA],
    )


def measure_normalizers(corpus: Corpus) -> NormalizerTable:
    """Base and scale of every layout, from its training networks.

    Raises:
        CorpusError: Weights are packed in integers, which no generator writes.
    """
    refuse_packed_weights(corpus)
    normalizers = {}
    for layout_id, network in corpus.networks.items():
        values_ND = corpus.values(corpus.select(layout_id=layout_id, split="train"))
        base_D = corpus.base_values(layout_id)
        normalizers[layout_id] = (network.layout, Normalizer.measure(network.layout, values_ND, base_D))
    return normalizers


def data_spec(corpus: Corpus) -> DataSpec:
    """Features and classes of the corpus' tasks; of none where only weights are known."""
    tasks = [build_task(task.recipe) for task in corpus.tasks.values()] or [build_task({"name": BLANK})]
    splits = corpus.facts.column("split").to_pylist()
    policies = {name for name, split in zip(policy_names(corpus), splits, strict=True) if split == "train"}
    return DataSpec(
        num_features=tasks[0].train_inputs.num_features,
        max_classes=max(task.num_classes for task in tasks),
        policies=tuple(sorted(policies)),
    )


class BatchPlan:
    """Batch t of a stage, as one worker sees it.

    Args:
        rows: What there is to draw from.
        seed: Of order, conditions and queries.
        num_condition_samples: Labelled samples shown per network.
        num_query_samples: Further labelled samples per network.
        shot: Labelled samples of each class shown per network, none of them among its query; 0 draws both at random.
        num_targets: Local targets of each trajectory; 0 takes every checkpoint on its own.
        rank: This worker.
        num_workers: Of how many.
        device: Where batches go.
    """

    def __init__(
        self,
        rows: list[LayoutRows],
        *,
        seed: int,
        num_condition_samples: int,
        num_query_samples: int,
        shot: int = 0,
        num_targets: int = 0,
        rank: int = 0,
        num_workers: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._rows = [trajectory_rows(of_layout, num_targets) for of_layout in rows] if num_targets else rows
        self._seed = seed
        self._shot = shot
        self._num_condition_samples = num_condition_samples
        self._num_query_samples = num_query_samples
        self._rank = rank
        self._num_workers = num_workers
        self._device = device or torch.device("cpu")
        self._permutations: dict[tuple[int, int], Tensor] = {}

    @property
    def num_layouts(self) -> int:
        """Layouts that take turns."""
        return len(self._rows)

    def batch(self, step: int, batch_size: int) -> WeightBatch:
        """This worker's part of batch `step`; parts of all workers together are `batch_size` networks."""
        return self._batch(step, batch_size, torch.arange(self._rank, batch_size, self._num_workers))

    def whole_batch(self, step: int, batch_size: int) -> WeightBatch:
        """All of batch `step`, the same on every worker."""
        return self._batch(step, batch_size, torch.arange(batch_size))

    def _batch(self, step: int, batch_size: int, place_B: Tensor) -> WeightBatch:
        turn = step % len(self._rows)
        rows = self._rows[turn]
        first = step // len(self._rows) * batch_size
        row_B = self._row_indices(turn, first + place_B)
        sample_index_B = step * batch_size + place_B
        tasks = [rows.tasks[int(row)] for row in row_B]
        condition, query = self._samples(tasks, sample_index_B)
        condition = replace(condition, policies=tuple(rows.policies[int(row)] for row in row_B))
        return WeightBatch(
            values_BD=rows.values_ND[row_B].to(self._device),
            layout=rows.layout,
            module=rows.module,
            condition=condition.to(self._device),
            query=query.to(self._device),
            sample_index_B=sample_index_B.to(self._device),
            targets_BAD=None if rows.targets_NAD is None else rows.targets_NAD[row_B].to(self._device),
        )

    def _samples(self, tasks: list[Task], sample_index_B: Tensor) -> tuple[Condition, Condition]:
        """Returns the conditions of the networks, and the query samples by which they are judged."""
        condition_noise = KeyedNoise(self._seed, sample_index_B, _CONDITION_STREAM)
        if self._shot:
            return draw_few_shot(tasks, self._shot, self._num_query_samples, condition_noise)
        query_noise = KeyedNoise(self._seed, sample_index_B, _QUERY_STREAM)
        condition = draw_condition(tasks, self._num_condition_samples, condition_noise)
        return condition, draw_condition(tasks, self._num_query_samples, query_noise)

    def _row_indices(self, turn: int, position_B: Tensor) -> Tensor:
        """Rows at positions of the layout's endless sequence of epochs, each a permutation of its own."""
        count = len(self._rows[turn].tasks)
        epochs = [int(position) // count for position in position_B]
        wanted = {(turn, epoch) for epoch in epochs}
        for key in wanted:
            if key not in self._permutations:
                # One epoch per layout is kept, and the next while a batch straddles both.
                stale = [old for old in self._permutations if old[0] == turn and old[1] < min(epochs)]
                for old in stale:
                    del self._permutations[old]
                self._permutations[key] = self._permutation(*key, count)
        return torch.stack(
            [
                self._permutations[turn, epoch][int(position) % count]
                for epoch, position in zip(epochs, position_B, strict=True)
            ]
        )

    def _permutation(self, turn: int, epoch: int, count: int) -> Tensor:
        key = KeyedNoise(self._seed, torch.tensor([epoch]), turn).uniform(count)
        return key[0].argsort(stable=True)
