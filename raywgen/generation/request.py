"""Resolves a request: finds the tasks, if any is known, and the architectures that the settings name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from raywgen.config import ConfigError
from raywgen.corpus import Corpus, NetworkFacts, TaskFacts
from raywgen.corpus.chosen import networks_named, tasks_named
from raywgen.generation.conditions import make_condition
from raywgen.generation.config import AFTERWARDS, GenerateConfig
from raywgen.generation.fill import MOST_SAMPLES, TrainedGenerator
from raywgen.generators import Generator
from raywgen.tasks import build_network, network_name
from raywgen.tasks.networks import network_recipe
from raywgen.tasks.networks.registry import INPUT_SHAPE
from raywgen.tasks.no_task import blank_condition
from raywgen.tasks.runnable import taken_inputs
from raywgen.tasks.user_data import UserData, read_data
from raywgen.weights import Condition, StateDict

NO_TASK = ""
_CUSTOM = "custom"
_BEST_OF = 8
_LEAST_FEATURES = 2  # A blank condition has one sample of one value.


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """The networks that are wanted: each architecture for each task.

    Attributes:
        networks: Architectures.
        tasks: Tasks; empty where none is known. A task of the user's own has no recipe.
        condition: Condition of each task; a single blank one where no task is known.
        best_of: Candidates of each network; 1 where there is nothing to choose by.
        is_tried: Whether networks are run on their task's samples.
        kept_tensors: By layout id, the tensors that no generator writes, of architectures that nobody can build.
    """

    networks: list[NetworkFacts]
    tasks: list[TaskFacts]
    condition: Condition
    best_of: int
    is_tried: bool
    kept_tensors: dict[str, StateDict] = field(default_factory=dict)

    @property
    def task_ids(self) -> list[str]:
        """The ids of the tasks; `NO_TASK` alone where none is known."""
        return [task.task_id for task in self.tasks] or [NO_TASK]

    def condition_for(self, network: NetworkFacts) -> Condition:
        """Returns the conditions; where no task is known the network's name is the instruction, as in training."""
        return self.condition if self.tasks else replace(self.condition, instructions=(network.name,))


def resolve_request(config: GenerateConfig, corpus: Corpus | None, trained: TrainedGenerator) -> ResolvedRequest:
    """Finds the tasks and architectures that the settings name.

    Raises:
        ConfigError: There is no such task or architecture, or nothing that a setting needs is known of them.
        ConditionError: Instruction or data do not fit the generator, or an architecture of `networks` does not run on
            the samples.
        TaskError: An architecture of `networks` cannot be built.
    """
    generator = trained.generator
    data = None
    if config.instruction or corpus is None:
        data = read_data(config.data, trained.inputs).at_most(MOST_SAMPLES)
    if data is not None:
        pair = trained.features(data.x), data.labels
        condition = make_condition(generator, config.instruction, pair)
        tasks = [_custom_task(condition)]
    else:
        assert corpus is not None, "without a corpus the task is the user's own"
        condition, tasks = _stored_tasks(config, corpus, generator)
    if corpus is None or config.networks:
        networks = _own_networks(config, generator)
        if config.try_on_samples:
            networks = [_checked_to_run(network, condition, data) for network in networks]
    else:
        networks = _stored_networks(config, corpus, generator)
    unknown = "" if tasks else "no task is known"
    if tasks and not config.try_on_samples:
        unknown = "try_on_samples=false"
    if strange := [network.name for network in networks if not network.recipe]:
        unknown = unknown or f"nothing says how to build {strange[0]}"
    if unknown and ((config.best_of or 1) > 1 or config.num_unlabelled):
        wrong = f"num_unlabelled={config.num_unlabelled}" if config.num_unlabelled else f"best_of={config.best_of}"
        leave = f"leave it out and {AFTERWARDS}" if config.num_unlabelled else "leave it out"
        raise ConfigError(
            f"{wrong}: {unknown}, so networks are generated, but cannot be run on anything; {leave}, or describe "
            f"{config.corpus} by `raywgen corpus describe` and train anew"
        )
    return ResolvedRequest(
        networks=networks,
        tasks=tasks,
        condition=condition,
        best_of=config.best_of or (1 if unknown else _BEST_OF),
        is_tried=not unknown,
        kept_tensors={
            network.layout.id: corpus.kept_tensors(network.layout.id)
            for network in networks
            if corpus is not None and not network.recipe
        },
    )


def _custom_task(condition: Condition) -> TaskFacts:
    return TaskFacts(
        task_id=_CUSTOM,
        instruction=condition.instructions[0],
        split="seen",
        recipe={},
        samples_SF=condition.samples_BSF[0],
        labels_S=condition.labels_BS[0],
    )


def _stored_tasks(config: GenerateConfig, corpus: Corpus, generator: Generator) -> tuple[Condition, list[TaskFacts]]:
    """Returns the tasks that the settings name, with their conditions; no task for a corpus of weights alone."""
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
        return blank_condition(""), []
    tasks = tasks_named(corpus, config.tasks)[: config.limit]
    condition = Condition(
        instructions=tuple(task.instruction for task in tasks),
        samples_BSF=torch.stack([task.samples_SF for task in tasks]),
        labels_BS=torch.stack([task.labels_S for task in tasks]),
    )
    return condition, tasks


def _own_networks(config: GenerateConfig, generator: Generator) -> list[NetworkFacts]:
    networks = []
    for network in config.networks:
        recipe = network_recipe(network)
        with torch.device("meta"):
            layout = generator.layout_of(build_network(recipe).state_dict())
        if not generator.knows(layout):
            # Masks are recognised by their values, which a module on the meta device has not.
            layout = generator.layout_of(build_network(recipe).state_dict())
        networks.append(NetworkFacts(name=network_name(recipe), recipe=recipe, layout=layout))
    return networks


def _checked_to_run(network: NetworkFacts, condition: Condition, data: UserData | None) -> NetworkFacts:
    """Runs a network once on samples of the task, before anything is generated for it.

    A network that takes the user's samples only in their own shape gets this shape into its recipe.

    Raises:
        ConditionError: It does not run on them, or has too few outputs.
    """
    if not condition.labels_BS.numel() or condition.samples_BSF.shape[2] < _LEAST_FEATURES:
        return network
    flat_SF = condition.samples_BSF[0]
    shaped = [] if data is None or len(data.x) != len(flat_SF) else [data.x.float()]
    num_classes = int(condition.labels_BS.max()) + 1
    taken = taken_inputs(build_network(network.recipe), [flat_SF, *shaped], num_classes, network.name)[1]
    if taken.shape == flat_SF.shape:
        return network
    return replace(network, recipe={**network.recipe, INPUT_SHAPE: list(taken.shape[1:])})


def _stored_networks(config: GenerateConfig, corpus: Corpus, generator: Generator) -> list[NetworkFacts]:
    chosen = networks_named(corpus, config.network)
    if strange := [net.name for net in chosen if net.layout.id not in generator.normalizers]:
        raise ConfigError(
            f"network={strange[0]}: {config.generator} was never trained on it; give the corpus it was trained on, "
            "or ask for an architecture that it never saw by networks=[...]"
        )
    return chosen
