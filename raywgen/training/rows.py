"""The checkpoints that a run is trained on: which there are, in one order that all workers agree on.

Only facts are read here. Weights stay in their shards until a batch asks for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor, nn

from raywgen.corpus import Corpus
from raywgen.corpus.tokens import StoredTokens, TokenCorpus
from raywgen.tasks import Task, build_network, build_task
from raywgen.tasks.no_task import BLANK
from raywgen.training.stored_weights import StoredWeights, Weights
from raywgen.weights import Layout, Windows

# Arrow creates these functions at import, so no type checker sees them.
pc: Any = pyarrow.compute
_TRAIN, _HELD, _BASE = "train", "validation", "base"


class HeaderMoments(Protocol):
    """The moments of the groups of N checkpoints."""

    def of(self, index_B: Tensor, windows: Windows) -> Tensor:
        """Returns those of the header chunks of a window of each, float32 `(B, Y, K)`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """All checkpoints of one layout and some splits, or the ends of their trajectories, as they are read.

    Attributes:
        layout: Theirs.
        weights: The reader of their flat vectors.
        index_N: Which of `weights` each is, int64.
        tokens: The reader of the tokens of `weights`; None without tokens.
        target_index_NA: Which of `weights` the local targets of each are, where `trajectory_rows` made the rows.
        moments: The reader of the moments of `weights`; None where windows need none.
    """

    layout: Layout
    weights: Weights
    index_N: Tensor
    tokens: StoredTokens | None = None
    target_index_NA: Tensor | None = None
    moments: HeaderMoments | None = None

    def __len__(self) -> int:
        return len(self.index_N)

    def stored(self) -> StoredRows:
        """Returns the rows without what is known of each beside its weights."""
        return StoredRows(
            layout=self.layout,
            weights=self.weights,
            index_N=self.index_N,
            tokens=self.tokens,
            target_index_NA=self.target_index_NA,
            moments=self.moments,
        )

    def values(self, row_B: Tensor, windows: Windows | None = None) -> Tensor:
        """Reads networks, float32 `(B, D)`, or the values of a window of each."""
        return self._read(self.index_N[row_B], windows)

    def codes(self, row_B: Tensor, windows: Windows | None = None) -> Tensor:
        """Reads the tokens of networks, int64 `(B, M, L)`, or those that belong to a window of each."""
        assert self.tokens is not None, "the rows have no tokens"
        return self.tokens.codes(self.index_N[row_B], None if windows is None else windows.code_index_BX)

    def header_moments(self, row_B: Tensor, windows: Windows | None) -> Tensor | None:
        """Reads the moments of the header chunks of a window of each network, float32; None where they have none."""
        if windows is None or windows.header is None:
            return None
        assert self.moments is not None, "the rows have no moments"
        return self.moments.of(self.index_N[row_B], windows)

    def targets(self, row_B: Tensor, windows: Windows | None = None) -> Tensor | None:
        """Reads the local targets of networks, float32 `(B, A, D)`, or a window of each; None where rows have none."""
        if self.target_index_NA is None:
            return None
        index_BA = self.target_index_NA[row_B]
        states = [self._read(index_B, windows) for index_B in index_BA.unbind(1)]
        return torch.stack(states, dim=1)

    def _read(self, index_B: Tensor, windows: Windows | None) -> Tensor:
        if windows is None:
            return self.weights.values(index_B)
        return self.weights.windows(index_B, windows.start_B, windows.num_values)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRows(StoredRows):
    """The same checkpoints with what is known of each.

    Attributes:
        module: Builds a network of the layout, once; an empty module where the corpus does not know how to build one.
        tasks: The task that each was trained for, N entries.
        trajectories: On which optimisation run each lies, N entries.
        steps: Optimiser step of each, N entries.
        policies: Name of the optimiser of each, N entries.
        ids: Id of each, N entries.
    """

    module: Callable[[], nn.Module]
    tasks: list[Task]
    trajectories: list[str]
    steps: list[int]
    policies: list[str]
    ids: list[str]

    def digest(self) -> str:
        """Changes with which checkpoints these are, with their order, and with what is known of each."""
        facts = [
            self.layout.id,
            self.ids,
            [task.id for task in self.tasks],
            self.trajectories,
            self.steps,
            self.policies,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class TrajectoryError(ValueError):
    """A corpus whose trajectories do not hold what a generator asks for; the message names the remedy."""


def layout_rows(corpus: Corpus, splits: Sequence[str]) -> list[LayoutRows]:
    """Lists the checkpoints of some splits by layout, in the order of shards and rows."""
    selected = corpus.select(split=list(splits))
    policy_of = dict(zip(corpus.facts.column("checkpoint_id").to_pylist(), policy_names(corpus), strict=True))
    number_of = {shard.path: number for number, shard in enumerate(corpus.shards)}
    found = []
    for layout_id, network in corpus.networks.items():
        facts = selected.filter(pc.equal(selected.column("layout_id"), layout_id))
        if not facts.num_rows:
            continue
        shards = pa.array([number_of[path] for path in facts.column("shard").to_pylist()])
        facts = facts.append_column("_shard", shards).sort_by([("_shard", "ascending"), ("row", "ascending")])
        ids = facts.column("checkpoint_id").to_pylist()
        found.append(
            LayoutRows(
                layout=network.layout,
                module=cache(partial(build_network, network.recipe) if network.recipe else nn.Module),
                weights=StoredWeights(corpus, network.layout, facts),
                index_N=torch.arange(len(ids)),
                tasks=[
                    build_task(task_recipe(corpus, task_id, layout_id))
                    for task_id in facts.column("task_id").to_pylist()
                ],
                trajectories=facts.column("trajectory_id").to_pylist(),
                steps=facts.column("step").to_pylist(),
                policies=[policy_of[name] for name in ids],
                ids=ids,
            )
        )
    return found


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
    def of(cls, corpus: Corpus) -> RunRows:
        """Lists the checkpoints of a corpus.

        Raises:
            CorpusError: There is nothing to train on.
        """
        corpus.shards_of([_TRAIN])  # Raises where there are none.
        return cls(train=layout_rows(corpus, [_TRAIN]), held=layout_rows(corpus, [_HELD]))

    def with_tokens(self, tokens: TokenCorpus) -> RunRows:
        """Returns the same checkpoints with their tokens.

        Raises:
            TokensError: The tokens of a checkpoint are not there.
        """
        train, held = (
            [replace(rows, tokens=tokens.of(rows.layout.id, rows.ids)) for rows in part]
            for part in (self.train, self.held)
        )
        return RunRows(train=train, held=held)

    def with_moments(self, moments: Sequence[HeaderMoments | None]) -> RunRows:
        """Returns the same checkpoints with their moments: of the layouts to train on, then of those held back."""
        found = [
            replace(rows, moments=of_rows) for rows, of_rows in zip([*self.train, *self.held], moments, strict=True)
        ]
        return RunRows(train=found[: len(self.train)], held=found[len(self.train) :])

    def digest(self) -> str:
        """Changes with which checkpoints these are and with their order."""
        facts = [[rows.digest() for rows in self.train], [rows.digest() for rows in self.held]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


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
    content = [[shard.sha256 for shard in shards], facts, recipes, networks]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def task_recipe(corpus: Corpus, task_id: str | None, layout_id: str) -> dict[str, Any]:
    """Returns a checkpoint's task; without one, a placeholder whose instruction is the network's name."""
    if task_id is None or task_id not in corpus.tasks:
        return {"name": BLANK, "instruction": corpus.networks[layout_id].name}
    return corpus.tasks[task_id].recipe


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
        index_N=rows.index_N[index_NA[:, -1]],
        tasks=[rows.tasks[place] for place in ends],
        trajectories=[rows.trajectories[place] for place in ends],
        steps=[rows.steps[place] for place in ends],
        policies=[rows.policies[place] for place in ends],
        ids=[rows.ids[place] for place in ends],
        target_index_NA=rows.index_N[index_NA],
    )
