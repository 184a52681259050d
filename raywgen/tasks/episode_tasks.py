"""Few-shot episodes of labelled images as tasks: trained on the support set, judged on the query set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from raywgen.tasks.base import Inputs, Task
from raywgen.tasks.episodes import Episode, EpisodeSampler
from raywgen.tasks.image_tasks import classes_of, images_in, images_of, input_statistics, network_inputs

_PLAIN = "plain"
_NO_DOMAIN = ("domain", _PLAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSpec:
    """The data that episodes are drawn from, and their size.

    Attributes:
        path: The images: what `load_images` takes, or `digits`.
        split: `train`, `validation` or `test`, whose classes are disjoint; or `all`.
        way: Number of classes of an episode.
        shot: Support images of each class.
        num_query: Query images of each class.
        group: Column whose groups stay in one split, such as `alphabet`; empty to split class by class.
        rotations: Counts every class turned by 90, 180 and 270 degrees as a class of its own.
        seed: Decides the split of the classes and all episodes.
        size: Height and width that images are scaled to; None keeps their own.
        channels: 1 or 3; None keeps what is stored.
        domain: The domain in which images are seen, as `apply_domain` takes it.
    """

    path: str
    split: str = "train"
    way: int = 5
    shot: int = 1
    num_query: int = 15
    group: str = ""
    rotations: bool = False
    seed: int = 0
    size: int | None = None
    channels: int | None = None
    domain: str = _PLAIN

    def recipe(self, index: int) -> dict[str, Any]:
        """Returns the keys of a task's recipe; values that say nothing are left out."""
        values = {"path": self.path, "index": index} | dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value not in (None, "") and (key, value) != _NO_DOMAIN}


def episode_task(spec: EpisodeSpec, index: int) -> Task:
    """Returns the task of one episode on pixels.

    Args:
        spec: The data and the size of the episode.
        index: Number of the episode, from 0 to 2**64 - 1.

    Raises:
        TaskError: Classes or images do not suffice, or there is no such domain.
    """
    statistics = input_statistics(spec.path, spec.size, spec.channels)
    return task_of_episode(
        {"name": "episode"} | spec.recipe(index),
        spec,
        _sampler(spec).episode(index),
        lambda x_SCHW: network_inputs(x_SCHW, _PLAIN, statistics),
    )


def task_of_episode(
    recipe: dict[str, Any], spec: EpisodeSpec, episode: Episode, as_inputs: Callable[[Tensor], Tensor]
) -> Task:
    """Returns an episode as a task.

    Args:
        recipe: Recipe of the task.
        spec: The data and the size of the episode.
        episode: The images and labels.
        as_inputs: Turns pixels into inputs `(S, F)`.
    """
    data_name = images_of(spec.path, spec.size, spec.channels, None).name
    is_plain = spec.domain == _PLAIN
    domain_part, seen = ("", "") if is_plain else (f"{spec.domain}/", f", seen under {spec.domain}")
    return Task(
        id=f"{data_name}/{spec.way}-way-{spec.shot}-shot/{domain_part}{spec.split}-{recipe['index']}",
        instruction=f"Which of these {spec.way} classes is in the image{seen}?",
        recipe=recipe,
        train_inputs=Inputs(as_inputs(episode.support_x)),
        train_y_S=episode.support_y,
        test_inputs=Inputs(as_inputs(episode.query_x)),
        test_y_S=episode.query_y,
        num_classes=spec.way,
    )


@lru_cache(maxsize=16)
def _sampler(spec: EpisodeSpec) -> EpisodeSampler:
    data = images_in(spec.path, spec.domain, spec.size, spec.channels)
    classes = classes_of(data, spec.split, spec.group, spec.seed)
    return EpisodeSampler(
        data,
        classes,
        way=spec.way,
        shot=spec.shot,
        num_query=spec.num_query,
        seed=spec.seed,
        rotations=spec.rotations,
    )
