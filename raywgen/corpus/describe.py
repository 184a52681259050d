"""Adds tasks and network recipes to a corpus of weights; the weights do not change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from raywgen.corpus.commit import commit_corpus, stored_shards
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import TaskFacts
from raywgen.corpus.statistics import statistics_from_json
from raywgen.corpus.writing import writing
from raywgen.names import nearest
from raywgen.weights import Layout

_BASE = "base"
_BY_ID = "layout-"
_ID_SIGNS = 6
_SHOWN_NAMES = 8


def describe(
    location: str | Path,
    tasks: Sequence[TaskFacts],
    recipes: Mapping[str, Mapping[str, object]],
    layouts: Mapping[str, Layout] | None = None,
) -> Corpus:
    """Adds tasks and recipes of networks to a corpus in place; entries with the same names are replaced.

    If no checkpoint has a task yet, a single task is assigned to all of them; otherwise the fact `task_id` of a
    checkpoint names its task.

    Args:
        location: Path or URI.
        tasks: Tasks that networks were trained for.
        recipes: Recipes for `build_network`, by the names of `corpus.networks` or ids of layouts.
        layouts: Layouts of the networks that the recipes build, by the same names, in the order of the corpus' flat
            vectors.

    Raises:
        CorpusError: A task belongs to no checkpoint, a network does not exist, or a file cannot be written.
        InUseError: Another process writes to the corpus.
    """
    with writing(location):
        return _describe(Corpus.open(location), tasks, recipes, layouts or {})


def _describe(
    corpus: Corpus,
    tasks: Sequence[TaskFacts],
    recipes: Mapping[str, Mapping[str, object]],
    layouts: Mapping[str, Layout],
) -> Corpus:
    recipes = by_network_name(corpus, recipes)
    named = _named_tasks(corpus, tasks)
    if lost := [task.task_id for task in tasks if task.task_id not in named]:
        names = ", ".join(sorted({name for name in named if name})) or "none"
        raise CorpusError(
            f"{corpus.location}: no checkpoint is of task '{lost[0]}' (its facts name {names}); name it there by a "
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
            (key, split): sums.named_as(corpus.layout(key), networks[key].layout)
            for (key, split), sums in statistics_from_json(corpus.manifest.get("statistics", {})).items()
        },
    )


def by_network_name(corpus: Corpus, recipes: Mapping[str, Mapping[str, object]]) -> dict[str, Mapping[str, object]]:
    """Converts recipes by name or layout id to recipes by the names of the corpus' networks.

    Raises:
        CorpusError: There is no such network, or one is named twice.
    """
    found: dict[str, Mapping[str, object]] = {}
    for key, recipe in recipes.items():
        name = _network_of(corpus, key)
        if name in found:
            raise CorpusError(f"'{key}' names network '{name}' of {corpus.location} again; keep one recipe for it")
        found[name] = recipe
    return found


def _network_of(corpus: Corpus, name_or_id: str) -> str:
    names = [network.name for network in corpus.networks.values()]
    if name_or_id in names:
        return name_or_id
    start = name_or_id.removeprefix(_BY_ID)
    matches = [net.name for key, net in corpus.networks.items() if len(start) >= _ID_SIGNS and key.startswith(start)]
    if len(matches) == 1:
        return matches[0]
    near = nearest(name_or_id, names)
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
    raise CorpusError(f"{corpus.location} holds no network '{name_or_id}'; did you mean '{near}'? It holds {shown}")


def template(corpus: Corpus) -> str:
    """Returns the YAML of a description to fill in, with the names of the corpus."""
    tasks = sorted({name for name in corpus.facts.column("task_id").to_pylist() if name}) or ["TASK"]
    lines = ["tasks: # what the networks were trained for"]
    lines += [f"  {json.dumps(name)}: {{name: images, path: train.parquet, test_path: test.parquet}}" for name in tasks]
    lines.append("networks: # how they are built: a name of the registry, or package.module:Class, and its arguments")
    for network in corpus.networks.values():
        first = network.layout.tensors[0]
        shown = f"{network.layout.num_values:,} values, {first.name} {list(first.shape)}, ..."
        lines.append(f"  {json.dumps(network.name)}: {json.dumps(network.recipe or {'name': 'NAME'})} # {shown}")
    return "\n".join(lines)


def _named_tasks(corpus: Corpus, tasks: Sequence[TaskFacts]) -> list[str | None]:
    """Returns the task of every checkpoint."""
    named = corpus.facts.column("task_id").to_pylist()
    if len(tasks) != 1 or any(named):
        return named
    return [None if split == _BASE else tasks[0].task_id for split in corpus.facts.column("split").to_pylist()]
