"""Tasks seen through a frozen encoder: their inputs are its features."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from raywgen.tasks.base import Inputs, Task
from raywgen.tasks.encoders import FrozenEncoder, load_encoder
from raywgen.tasks.episodes import Episode, EpisodeSampler
from raywgen.tasks.features import encode_images, encode_inputs, turned_classes
from raywgen.tasks.image_tasks import classes_of, images_in, images_of, input_statistics, task_of_episode
from raywgen.tasks.images import ImageData


def feature_episode_task(
    encoder: str,
    path: str,
    index: int,
    split: str = "train",
    way: int = 5,
    shot: int = 1,
    num_query: int = 15,
    group: str = "",
    rotations: bool = False,
    seed: int = 0,
    size: int | None = None,
    channels: int | None = None,
    domain: str = "plain",
) -> Task:
    """The few-shot episode that `episode_task` draws by the same arguments, seen through an encoder.

    All images are encoded at the first episode, and cached.

    Args:
        encoder: What `load_encoder` takes.
        path: What `load_images` takes, or `digits`.
        index: Of the episode.
        split: `train`, `validation` or `test`: classes of the three are disjoint; or `all`.
        way: Classes.
        shot: Support images of each.
        num_query: Query images of each.
        group: Column whose groups stay in one split, such as `alphabet`.
        rotations: Turned classes are classes of their own.
        seed: Of the split of classes and of all episodes.
        size: Images are scaled to `size x size`.
        channels: 1 or 3; as they are stored by default.
        domain: Under which images are seen, as `apply_domain` takes it.

    Raises:
        EncoderError: The encoder is missing or damaged, or does not take these images.
        TaskError: Classes or images do not suffice.
    """
    sampler = _sampler(encoder, path, split, way, shot, num_query, group, rotations, seed, size, channels, domain)
    episode: Episode = sampler.episode(index)
    recipe: dict[str, Any] = {
        "name": "feature-episode", "encoder": encoder, "path": path, "index": index, "split": split, "way": way,
        "shot": shot, "num_query": num_query, "group": group, "rotations": rotations, "seed": seed, "size": size,
        "channels": channels, "domain": domain,
    }  # fmt: skip
    name = images_of(path, size, channels, None).name
    task = task_of_episode(recipe, episode, name, lambda x_S1E: x_S1E.flatten(1))
    return dataclasses.replace(task, id=_seen_through(task.id, encoder))


def encoded_task(encoder: str, task: Mapping[str, Any]) -> Task:
    """Any other task, seen through an encoder.

    Args:
        encoder: What `load_encoder` takes.
        task: Recipe of the task; its inputs are encoded once per machine.

    Raises:
        EncoderError: The encoder is missing or damaged, or does not take the task's inputs.
        TaskError: The task cannot be built.
    """
    # The registry knows this task, and so cannot be imported above.
    from raywgen.tasks.registry import build_task

    plain, frozen = build_task(task), _encoder(encoder)
    return dataclasses.replace(
        plain,
        id=_seen_through(plain.id, encoder),
        recipe={"name": "encoded", "encoder": encoder, "task": plain.recipe},
        train_inputs=Inputs(encode_inputs(plain.train_x_SF, frozen)),
        test_inputs=Inputs(encode_inputs(plain.test_x_SF, frozen)),
    )


def _seen_through(task_id: str, encoder: str) -> str:
    name = re.split(r"[/:.]", encoder.rstrip("/"))[-1]
    return f"{task_id}/through-{name}"


@lru_cache(maxsize=2)
def _encoder(told: str) -> FrozenEncoder:
    return load_encoder(told)


@lru_cache(maxsize=4)
def _features(
    encoder: str, path: str, rotations: bool, size: int | None, channels: int | None, domain: str
) -> ImageData:
    mean, std = (tuple(values.flatten().tolist()) for values in input_statistics(path, size, channels))
    images = images_in(path, domain, size, channels)
    return encode_images(images, _encoder(encoder), rotations=rotations, statistics=(mean, std))


@lru_cache(maxsize=16)
def _sampler(
    encoder: str,
    path: str,
    split: str,
    way: int,
    shot: int,
    num_query: int,
    group: str,
    rotations: bool,
    seed: int,
    size: int | None,
    channels: int | None,
    domain: str,
) -> EpisodeSampler:
    """Draws the rows that the sampler of `episode_task` draws: turned classes come in the same order there."""
    data = images_of(path, size, channels, None)
    chosen = classes_of(data, split, group, seed)
    classes = turned_classes(chosen, len(data.class_names), rotations=rotations)
    features = _features(encoder, path, rotations, size, channels, domain)
    return EpisodeSampler(features, classes, way=way, shot=shot, num_query=num_query, seed=seed)
