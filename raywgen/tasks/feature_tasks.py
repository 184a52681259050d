"""Tasks seen through a frozen encoder: their inputs are its features."""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache

from raywgen.tasks.base import Inputs, Task
from raywgen.tasks.encoders import FrozenEncoder, load_encoder
from raywgen.tasks.episode_tasks import EpisodeSpec, task_of_episode
from raywgen.tasks.episodes import EpisodeSampler
from raywgen.tasks.features import encode_images, encode_inputs, turned_classes
from raywgen.tasks.image_tasks import classes_of, images_in, images_of, input_statistics
from raywgen.tasks.images import ImageData


def feature_episode_task(encoder: str, spec: EpisodeSpec, index: int) -> Task:
    """Returns the episode that `episode_task` draws by the same arguments, with features for inputs.

    All images are encoded at the first episode, and cached.

    Args:
        encoder: The encoder, as `load_encoder` takes it.
        spec: The data and the size of the episode.
        index: Number of the episode, from 0 to 2**64 - 1.

    Raises:
        EncoderError: The encoder is missing or damaged, or does not take these images.
        TaskError: Classes or images do not suffice.
    """
    recipe = {"name": "feature-episode", "encoder": encoder} | spec.recipe(index)
    task = task_of_episode(recipe, spec, _sampler(encoder, spec).episode(index), lambda x_SF11: x_SF11.flatten(1))
    return dataclasses.replace(task, id=_encoded_id(task.id, encoder))


def encoded_task(encoder: str, task: Task) -> Task:
    """Returns any other task with features for inputs; they are computed once per machine.

    Args:
        encoder: The encoder, as `load_encoder` takes it.
        task: The task to encode.

    Raises:
        EncoderError: The encoder is missing or damaged, or does not take the task's inputs.
    """
    frozen = _encoder(encoder)
    return dataclasses.replace(
        task,
        id=_encoded_id(task.id, encoder),
        recipe={"name": "encoded", "encoder": encoder, "task": task.recipe},
        train_inputs=Inputs(encode_inputs(task.train_x_SF, frozen)),
        test_inputs=Inputs(encode_inputs(task.test_x_SF, frozen)),
    )


def _encoded_id(task_id: str, encoder: str) -> str:
    name = re.split(r"[/:.]", encoder.rstrip("/"))[-1]
    return f"{task_id}/through-{name}"


@lru_cache(maxsize=2)
def _encoder(encoder: str) -> FrozenEncoder:
    return load_encoder(encoder)


@lru_cache(maxsize=4)
def _features(
    encoder: str, path: str, rotations: bool, size: int | None, channels: int | None, domain: str
) -> ImageData:
    mean, std = (tuple(values.flatten().tolist()) for values in input_statistics(path, size, channels))
    images = images_in(path, domain, size, channels)
    return encode_images(images, _encoder(encoder), rotations=rotations, statistics=(mean, std))


@lru_cache(maxsize=16)
def _sampler(encoder: str, spec: EpisodeSpec) -> EpisodeSampler:
    """Returns a sampler of the rows that `episode_task` draws: turned classes come in the same order there."""
    data = images_of(spec.path, spec.size, spec.channels, None)
    chosen = classes_of(data, spec.split, spec.group, spec.seed)
    classes = turned_classes(chosen, len(data.class_names), rotations=spec.rotations)
    features = _features(encoder, spec.path, spec.rotations, spec.size, spec.channels, spec.domain)
    return EpisodeSampler(features, classes, way=spec.way, shot=spec.shot, num_query=spec.num_query, seed=spec.seed)
