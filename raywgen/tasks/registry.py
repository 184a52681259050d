"""Builds tasks from recipes: JSON-like dicts from which any process can build the same task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from raywgen.names import nearest
from raywgen.tasks.base import Task, TaskError
from raywgen.tasks.digits import digits_subset
from raywgen.tasks.domain_texts import domain_texts
from raywgen.tasks.episode_tasks import EpisodeSpec, episode_task
from raywgen.tasks.feature_tasks import encoded_task, feature_episode_task
from raywgen.tasks.image_tasks import image_task
from raywgen.tasks.no_task import BLANK, blank_task
from raywgen.tasks.sentence_tasks import sentence_groups
from raywgen.tasks.sentence_words import sentence_words
from raywgen.tasks.text_tasks import text_task
from raywgen.trust import check_recipe, reading

INSTRUCTION = "instruction"


def _episode(index: int, **spec: Any) -> Task:
    return episode_task(EpisodeSpec(**spec), index)


def _feature_episode(encoder: str, index: int, **spec: Any) -> Task:
    return feature_episode_task(encoder, EpisodeSpec(**spec), index)


def _encoded(encoder: str, task: Mapping[str, Any]) -> Task:
    return encoded_task(encoder, build_task(task))


TASKS: dict[str, Callable[..., Task]] = {
    "digits-subset": digits_subset,
    "images": image_task,
    "episode": _episode,
    "texts": text_task,
    "sentence-groups": sentence_groups,
    "sentence-words": sentence_words,
    "domain-texts": domain_texts,
    "feature-episode": _feature_episode,
    "encoded": _encoded,
    BLANK: blank_task,
}


def build_task(recipe: Mapping[str, Any]) -> Task:
    """Builds `{"name": NAME, **arguments}`; equal recipes share one task per process.

    Every recipe may hold an `instruction`, which replaces the task's own words for what its networks do.

    Raises:
        TaskError: The name is unknown (the nearest is named) or the arguments are refused.
        UntrustedError: It names a package or an address that the user did not; see `raywgen.trust`.
    """
    with reading(getattr(recipe, "source", "")):
        check_recipe(recipe, "task")
        return _build(json.dumps(dict(recipe), sort_keys=True))


@lru_cache(maxsize=16384)
def _build(recipe: str) -> Task:
    arguments = json.loads(recipe)
    name = str(arguments.pop("name", ""))
    if name not in TASKS:
        near = nearest(name, TASKS)
        raise TaskError(f"unknown task '{name}'; did you mean '{near}'?")
    changes = {INSTRUCTION: str(arguments.pop(INSTRUCTION))} if INSTRUCTION in arguments else {}
    try:
        task = TASKS[name](**arguments)
    except TypeError as error:
        raise TaskError(f"task '{name}' does not take {arguments}: {error}") from error
    return replace(task, **changes, recipe=task.recipe | changes)
