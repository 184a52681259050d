"""Says of a corpus that holds weights what its networks do and how they are built; the weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raywgen.corpus.commit import commit_corpus, stored_shards
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import TaskFacts
from raywgen.corpus.statistics import LayoutStatistics
from raywgen.corpus.writing import writing
from raywgen.names import nearest
from raywgen.weights import Layout

_BASE = "base"


def describe(
    location: str | Path,
    tasks: Sequence[TaskFacts],
    recipes: Mapping[str, Mapping[str, Any]],
    layouts: Mapping[str, Layout] | None = None,
) -> Corpus:
    """Adds tasks and recipes of networks to a corpus in place; what it had under the same names is replaced.

    A single task goes to all checkpoints where none has a task yet; otherwise checkpoints name theirs by their fact
    `task_id`.

    Args:
        location: Path or URI.
        tasks: What networks were trained for.
        recipes: What `build_network` takes, by the names that `corpus.networks` have.
        layouts: Of what the recipes build, by the same names, in the order of the corpus' flat vectors.

    Raises:
        CorpusError: A task is of no checkpoint, there is no network of a name, or a file cannot be written.
        InUseError: Another process writes to the corpus.
    """
    with writing(location):
        return _describe(Corpus.open(location), tasks, recipes, layouts or {})


def _describe(
    corpus: Corpus,
    tasks: Sequence[TaskFacts],
    recipes: Mapping[str, Mapping[str, Any]],
    layouts: Mapping[str, Layout],
) -> Corpus:
    known = {network.name: layout_id for layout_id, network in corpus.networks.items()}
    if strange := [name for name in recipes if name not in known]:
        near = nearest(strange[0], known)
        raise CorpusError(f"{corpus.location} holds no network '{strange[0]}'; did you mean '{near}'?")
    named = _named_tasks(corpus, tasks)
    if lost := [task.task_id for task in tasks if task.task_id not in named]:
        told = ", ".join(sorted({name for name in named if name})) or "none"
        raise CorpusError(
            f"{corpus.location}: no checkpoint is of task '{lost[0]}' (its facts name {told}); name it there by a "
            "column `task_id` of `raywgen corpus build --facts`"
        )
    networks = {
        layout_id: replace(
            network,
            recipe=dict(recipes.get(network.name, network.recipe)),
            layout=layouts.get(network.name, network.layout),
        )
        for layout_id, network in corpus.networks.items()
    }
    every = corpus.tasks | {task.task_id: task for task in tasks}
    return commit_corpus(
        corpus.location,
        shards=stored_shards(corpus, task_id=named),
        tasks=list(every.values()),
        networks=list(networks.values()),
        recipe=corpus.manifest["recipe"],
        quarantine=corpus.quarantine.to_pylist(),
        forms=corpus.forms,
        statistics={
            key: LayoutStatistics.from_json(row).named_as(corpus.layout(key), networks[key].layout)
            for key, row in corpus.manifest.get("statistics", {}).items()
        },
    )


def _named_tasks(corpus: Corpus, tasks: Sequence[TaskFacts]) -> list[str | None]:
    """The task of every checkpoint."""
    named = corpus.facts.column("task_id").to_pylist()
    if len(tasks) != 1 or any(named):
        return named
    return [None if split == _BASE else tasks[0].task_id for split in corpus.facts.column("split").to_pylist()]
