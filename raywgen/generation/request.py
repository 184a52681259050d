"""What is asked for: tasks, if any is known, and architectures.

Shape legend: B networks, S samples, F features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from raywgen.config import ConfigError
from raywgen.corpus import Corpus, NetworkFacts, TaskFacts
from raywgen.corpus.chosen import networks_named, tasks_named
from raywgen.generation.conditions import make_condition
from raywgen.generation.fill import MOST_SAMPLES, TrainedGenerator
from raywgen.generators import Generator
from raywgen.tasks import build_network, network_name
from raywgen.tasks.networks import network_recipe
from raywgen.tasks.networks.registry import INPUT_SHAPE
from raywgen.tasks.no_task import blank_condition
from raywgen.tasks.runnable import taken_inputs
from raywgen.tasks.user_data import UserData, read_data
from raywgen.weights import Condition

if TYPE_CHECKING:
    from raywgen.generation.write import GenerateConfig

NO_TASK = ""
_CUSTOM = "custom"
_BEST_OF = 8
_LEAST_FEATURES = 2  # A blank condition has one sample of one value.


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


def ask(config: GenerateConfig, corpus: Corpus | None, trained: TrainedGenerator) -> Asked:
    """From the settings.

    Raises:
        ConfigError: There is no such task or architecture, or nothing that a setting needs is known of them.
        ConditionError: Instruction or data do not fit the generator, or an architecture of `networks` does not run on
            the samples.
        TaskError: An architecture of `networks` cannot be built.
    """
    generator = trained.generator
    own = _own_data(config, trained) if config.instruction or corpus is None else None
    names, condition, tasks = _told(config, corpus, trained, own)
    if corpus is None or config.networks:
        networks = [_that_runs(network, condition, own) for network in _own_networks(config, generator)]
    else:
        networks = _stored(config, corpus, generator)
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


def _own_data(config: GenerateConfig, trained: TrainedGenerator) -> UserData:
    return read_data(config.data, trained.inputs).at_most(MOST_SAMPLES)


def _that_runs(network: NetworkFacts, condition: Condition, own: UserData | None) -> NetworkFacts:
    """The network, run once on samples of the task before anything is generated for it.

    One that takes the user's samples in their own shape alone gets this shape into its recipe.

    Raises:
        ConditionError: It does not run on them, or has too few outputs.
    """
    if not condition.labels_BS.numel() or condition.samples_BSF.shape[2] < _LEAST_FEATURES:
        return network
    flat_SF = condition.samples_BSF[0]
    shaped = [] if own is None or len(own.x) != len(flat_SF) else [own.x.float()]
    num_classes = int(condition.labels_BS.max()) + 1
    taken = taken_inputs(build_network(network.recipe), [flat_SF, *shaped], num_classes, network.name)[1]
    if taken.shape == flat_SF.shape:
        return network
    return replace(network, recipe={**network.recipe, INPUT_SHAPE: list(taken.shape[1:])})


def _told(
    config: GenerateConfig, corpus: Corpus | None, trained: TrainedGenerator, own: UserData | None
) -> tuple[list[str], Condition, list[TaskFacts]]:
    generator = trained.generator
    if own is not None:
        pair = trained.features(own.x), own.labels
        return [_CUSTOM], make_condition(generator, config.instruction, pair), []
    assert corpus is not None, "without a corpus the task is the user's own"
    if bool(corpus.tasks) != generator.data.has_tasks:
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
    tasks = tasks_named(corpus, config.tasks)[: config.limit]
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
        if not generator.knows(layout):
            # Masks are told by their values.
            layout = generator.layout_of(build_network(recipe).state_dict())
        networks.append(NetworkFacts(name=network_name(recipe), recipe=recipe, layout=layout))
    return networks


def _stored(config: GenerateConfig, corpus: Corpus, generator: Generator) -> list[NetworkFacts]:
    chosen = networks_named(corpus, config.network)
    if strange := [net.name for net in chosen if net.layout.id not in generator.normalizers]:
        raise ConfigError(
            f"network={strange[0]}: {config.generator} was never trained on it; give the corpus it was trained on, "
            "or ask for an architecture that it never saw by networks=[...]"
        )
    return chosen
