"""Finds tasks and networks of a corpus by the names that users type."""

from __future__ import annotations

from raywgen.config import ConfigError
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import UnknownFactError
from raywgen.corpus.facts import NetworkFacts, TaskFacts
from raywgen.names import nearest

_MOST_SHOWN = 8


def task_named(corpus: Corpus, task_id: str) -> TaskFacts:
    """Returns the task with an id.

    Raises:
        UnknownFactError: There is no such task; the message names the nearest.
    """
    if task_id in corpus.tasks:
        return corpus.tasks[task_id]
    known = f"did you mean '{nearest(task_id, corpus.tasks)}'?" if corpus.tasks else "it has no table of tasks"
    raise UnknownFactError(f"{corpus.location} has no task '{task_id}'; {known}")


def tasks_named(corpus: Corpus, name: str) -> list[TaskFacts]:
    """Returns the task with an id, or all tasks of a split.

    Raises:
        ConfigError: There is no such task or split; the message names the nearest.
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
    """Returns the network with a name, or all if the name is empty.

    Raises:
        ConfigError: There is no such network; the message names the nearest.
    """
    if found := [network for network in corpus.networks.values() if name in ("", network.name)]:
        return found
    names = [network.name for network in corpus.networks.values()]
    shown = ", ".join(names[:_MOST_SHOWN]) + (", ..." if len(names) > _MOST_SHOWN else "")
    raise ConfigError(f"network={name}: {corpus.location} has {shown}; did you mean '{nearest(name, names)}'?")
