"""Tasks and networks of a corpus by the names that people type."""

from __future__ import annotations

from raywgen.config import ConfigError
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import UnknownFactError
from raywgen.corpus.facts import NetworkFacts, TaskFacts
from raywgen.names import nearest

_MOST_SHOWN = 8


def task_named(corpus: Corpus, task_id: str) -> TaskFacts:
    """The task of that id.

    Raises:
        UnknownFactError: There is none; the nearest is named.
    """
    if task_id in corpus.tasks:
        return corpus.tasks[task_id]
    known = f"did you mean '{nearest(task_id, corpus.tasks)}'?" if corpus.tasks else "it has no table of tasks"
    raise UnknownFactError(f"{corpus.location} has no task '{task_id}'; {known}")


def tasks_named(corpus: Corpus, name: str) -> list[TaskFacts]:
    """The task of that id, or all tasks of that split.

    Raises:
        ConfigError: There is none; the nearest is named.
    """
    if found := [task for task in corpus.tasks.values() if name in (task.task_id, task.split)]:
        return found
    if not corpus.tasks:
        raise ConfigError(f"tasks={name}: {corpus.location} knows no task; describe them by `raywgen corpus describe`")
    splits = list(dict.fromkeys(task.split for task in corpus.tasks.values()))
    near = nearest(name, [*splits, *corpus.tasks])
    raise ConfigError(
        f"tasks={name}: {corpus.location} has no such task or split; did you mean '{near}'? "
        f"Give {', '.join(splits)}, or the id of a task"
    )


def networks_named(corpus: Corpus, name: str) -> list[NetworkFacts]:
    """The architecture of that name; all where the name is empty.

    Raises:
        ConfigError: There is none; the nearest is named.
    """
    if found := [network for network in corpus.networks.values() if name in ("", network.name)]:
        return found
    names = [network.name for network in corpus.networks.values()]
    shown = ", ".join(names[:_MOST_SHOWN]) + (", ..." if len(names) > _MOST_SHOWN else "")
    raise ConfigError(f"network={name}: {corpus.location} has {shown}; did you mean '{nearest(name, names)}'?")
