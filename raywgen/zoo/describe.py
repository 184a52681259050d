"""Reads a user's description of the tasks and architectures of imported networks.

tasks:
  cifar10: {name: images, path: cifar10-train.parquet, test_path: cifar10-test.parquet}
networks:
  resnet20: {name: cifar-resnet, depth: 20}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf.errors import OmegaConfBaseException

from raywgen.config import ConfigError, load_yaml, one_line
from raywgen.corpus import Corpus, TaskFacts
from raywgen.corpus.describe import by_network_name, describe
from raywgen.tasks import TaskError, build_network, build_task
from raywgen.tasks.networks import network_recipe
from raywgen.trust import named_in, trusting
from raywgen.weights import Layout
from raywgen.zoo.plan import task_facts

_PARTS = ("tasks", "networks")
_SPLIT = "split"
_NUM_CONDITION_SAMPLES = 64
_SPLITS = ("seen", "validation", "unseen")


def describe_corpus(location: str, path: str) -> Corpus:
    """Adds the descriptions of a YAML file to a corpus in place.

    Args:
        location: The corpus.
        path: A YAML file. Its `tasks` maps the task ids of checkpoints (or one new id if they have none) to recipes for
            `build_task`, with optional `instruction` and `split`. Its `networks` maps the names that `raywgen corpus
            info` lists to what `network_recipe` takes.

    Raises:
        ConfigError: The file cannot be read, or has other keys.
        TaskError: A task or network cannot be built, or a recipe builds another network than the corpus holds.
        CorpusError: The corpus has no network or task of such a name.
    """
    content = _read(Path(path))
    corpus = Corpus.open(location)
    recipes = by_network_name(corpus, {str(name): network_recipe(entry) for name, entry in content["networks"].items()})
    with trusting(*named_in(content)):
        built = {
            network.name: _built(network.name, recipes[network.name], network.layout)
            for network in corpus.networks.values()
            if network.name in recipes
        }
        tasks = [_task(str(task_id), entry, path) for task_id, entry in content["tasks"].items()]
    return describe(location, tasks, recipes, built)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = load_yaml(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{path} cannot be read ({one_line(error)}); give YAML with `tasks:` and `networks:`"
        ) from error
    if not isinstance(content, dict) or not content or not set(content) <= set(_PARTS):
        raise ConfigError(f"{path} holds something else than `tasks:` and `networks:`, each names with recipes")
    parts = {name: content.get(name) or {} for name in _PARTS}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise ConfigError(f"{path}: {name} holds no names with recipes; write `NAME: {{name: ...}}`")
    return parts


def _built(name: str, recipe: Mapping[str, object], stored: Layout) -> Layout:
    """Returns the layout of the network that a recipe builds, with the flat vector of the corpus.

    Raises:
        TaskError: The recipe builds another architecture than the corpus holds.
    """
    with torch.device("meta"):
        built = Layout.from_state_dict(build_network(recipe).state_dict())
    own = {plain for plain, spec in zip(stored.plain_names, stored.tensors, strict=True) if not spec.tied_to}
    built = built.rooted_at(own)
    if built.id == stored.id:
        return Layout(built.arranged_like(stored).tensors)
    # Files may lack counters, such as the number of batches that a norm has seen.
    theirs, ours = ({spec.name: spec.shape for spec in layout.generated} for layout in (stored, built))
    if theirs == ours:
        return stored
    differs = next(key for key in [*theirs, *ours] if theirs.get(key) != ours.get(key))
    raise TaskError(
        f"networks: {dict(recipe)} is no '{name}': {differs} is {_shape(theirs.get(differs))} in the corpus, "
        f"{_shape(ours.get(differs))} in the recipe; give the arguments it was built with"
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _task(task_id: str, entry: object, path: str) -> TaskFacts:
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: task '{task_id}' is no recipe; write for instance {{name: images, path: ...}}")
    recipe = {str(key): value for key, value in entry.items()}
    split = str(recipe.pop(_SPLIT, _SPLITS[0]))
    if split not in _SPLITS:
        raise ConfigError(f"{path}: split={split} of task '{task_id}': give one of {', '.join(_SPLITS)}")
    return task_facts(task_id, build_task(recipe), split, _NUM_CONDITION_SAMPLES, seed=0)
