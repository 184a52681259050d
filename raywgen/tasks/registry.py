"""Tasks by recipe: a JSON-like dict that any process can rebuild a task from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from raywgen.names import nearest
from raywgen.tasks.base import Task, TaskError
from raywgen.tasks.digits import digits_subset
from raywgen.tasks.feature_tasks import encoded_task, feature_episode_task
from raywgen.tasks.image_tasks import episode_task, image_task
from raywgen.tasks.no_task import BLANK, blank_task
from raywgen.tasks.text_tasks import text_task
from raywgen.trust import check_recipe, reading

INSTRUCTION = "instruction"
TASKS: dict[str, Callable[..., Task]] = {
    "digits-subset": digits_subset,
    "images": image_task,
    "episode": episode_task,
    "texts": text_task,
    "feature-episode": feature_episode_task,
    "encoded": encoded_task,
    BLANK: blank_task,
}


def build_task(recipe: Mapping[str, Any]) -> Task:
    """Builds `{"name": NAME, **arguments}`; equal recipes share one task per process.

    Of any task `instruction` says in other words what its networks do.

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
    told = {INSTRUCTION: str(arguments.pop(INSTRUCTION))} if INSTRUCTION in arguments else {}
    try:
        task = TASKS[name](**arguments)
    except TypeError as error:
        raise TaskError(f"task '{name}' does not take {arguments}: {error}") from error
    return replace(task, **told, recipe=task.recipe | told)
