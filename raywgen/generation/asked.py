"""What is asked for: tasks, if any is known, and architectures.

Shape legend: B networks, S samples, F features.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from raywgen.config import ConfigError
from raywgen.corpus import Corpus, NetworkFacts, TaskFacts
from raywgen.generation.fill import ConditionError, make_condition
from raywgen.generators import Generator
from raywgen.tasks import build_network, network_name
from raywgen.tasks.blank import blank_condition
from raywgen.tasks.networks import network_recipe
from raywgen.weights import Condition

if TYPE_CHECKING:
    from raywgen.generation.write import GenerateConfig

NO_TASK = ""
_CUSTOM = "custom"
_BEST_OF = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Networks that are asked for, each task and architecture of them.

    Attributes:
        networks: Architectures.
        names: Of the tasks; `NO_TASK` alone where none is known.
        condition: What the generator is told of each task.
        tasks: The corpus' facts of each; none of a task of the user's own.
        best_of: Candidates of each network; 1 where nothing tells which is best.
        is_tried: Whether networks are run on their task's samples.
    """

    networks: list[NetworkFacts]
    names: list[str]
    condition: Condition
    tasks: list[TaskFacts]
    best_of: int
    is_tried: bool


def ask(config: GenerateConfig, corpus: Corpus | None, generator: Generator) -> Asked:
    """From the settings.

    Raises:
        ConfigError: There is no such task or architecture, or nothing that a setting needs is known of them.
        ConditionError: Instruction or data do not fit the generator.
        TaskError: An architecture of `networks` cannot be built.
    """
    names, condition, tasks = _told(config, corpus, generator)
    networks = (
        _own_networks(config, generator) if corpus is None or config.networks else _stored(config, corpus, generator)
    )
    unknown = "no task is known" if names == [NO_TASK] else ""
    if strange := [network.name for network in networks if not network.recipe]:
        unknown = unknown or f"nothing says how to build {strange[0]}"
    if unknown and ((config.best_of or 1) > 1 or config.num_unlabelled):
        wrong = f"num_unlabelled={config.num_unlabelled}" if config.num_unlabelled else f"best_of={config.best_of}"
        raise ConfigError(
            f"{wrong}: {unknown}, so networks are written, but cannot be run on anything; leave it out, or describe "
            f"{config.corpus} by `raywgen corpus describe` and train anew"
        )
    return Asked(
        networks=networks,
        names=names,
        condition=condition,
        tasks=tasks,
        best_of=config.best_of or (1 if unknown else _BEST_OF),
        is_tried=not unknown,
    )


def _told(
    config: GenerateConfig, corpus: Corpus | None, generator: Generator
) -> tuple[list[str], Condition, list[TaskFacts]]:
    if config.instruction or corpus is None:
        return [_CUSTOM], make_condition(generator, config.instruction, read_npz(config.data)), []
    if bool(corpus.tasks) != generator.data.knows_tasks:
        remedy = (
            "train it anew on the corpus as it is described now"
            if corpus.tasks
            else "say what to write for by instruction=... data=..., or give the corpus it was trained on"
        )
        knows = ("weights alone", "knows tasks") if corpus.tasks else ("tasks", "holds weights alone")
        raise ConfigError(f"{config.generator} was trained on {knows[0]}, {config.corpus} {knows[1]}; {remedy}")
    if not corpus.tasks:
        if config.tasks != type(config).tasks:
            raise ConfigError(
                f"tasks={config.tasks}: {config.corpus} holds weights alone and knows no task; leave it out"
            )
        return [NO_TASK], blank_condition(""), []
    tasks = [task for task in corpus.tasks.values() if config.tasks in (task.task_id, task.split)][: config.limit]
    if not tasks:
        raise ConfigError(
            f"tasks={config.tasks}: {config.corpus} has no such task or split; give seen, validation, unseen "
            f"or an id such as {next(iter(corpus.tasks))}"
        )
    condition = Condition(
        instructions=tuple(task.instruction for task in tasks),
        samples_BSF=torch.stack([task.samples_SF for task in tasks]),
        labels_BS=torch.stack([task.labels_S for task in tasks]),
    )
    return [task.task_id for task in tasks], condition, tasks


def _own_networks(config: GenerateConfig, generator: Generator) -> list[NetworkFacts]:
    networks = []
    for told in config.networks:
        recipe = network_recipe(told)
        with torch.device("meta"):
            layout = generator.layout_of(build_network(recipe).state_dict())
        networks.append(NetworkFacts(name=network_name(recipe), recipe=recipe, layout=layout))
    return networks


def _stored(config: GenerateConfig, corpus: Corpus, generator: Generator) -> list[NetworkFacts]:
    chosen = [net for net in corpus.networks.values() if config.network in ("", net.name)]
    if not chosen:
        known = ", ".join(net.name for net in corpus.networks.values())
        raise ConfigError(f"network={config.network}: {config.corpus} has {known}")
    if strange := [net.name for net in chosen if net.layout.id not in generator.references]:
        raise ConfigError(
            f"network={strange[0]}: {config.generator} was never trained on it; give the corpus it was trained on, "
            "or ask for an architecture that it never saw by networks=[...]"
        )
    return chosen


def read_npz(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and labels of an `.npz` file.

    Raises:
        ConditionError: It holds no arrays `x` and `y`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConditionError(f"{path}: {error}; give an .npz file with arrays x (samples first) and y") from error
