"""Compares fine-tuning from generated networks with that from random starts and the nearest stored networks.

Shape letters beyond the legend in `raywgen.weights`: T tasks, n candidates of a task.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.config import ConfigError, save_config
from raywgen.corpus import Corpus, NetworkFacts, TaskFacts
from raywgen.corpus.chosen import networks_named, tasks_named
from raywgen.evaluation.finetuning import FineTuned, FineTuningConfig, fine_tune
from raywgen.evaluation.request import TaskRequest
from raywgen.evaluation.retrieve import nearest
from raywgen.files import write_text
from raywgen.generation import TrainedGenerator, generate_best, load
from raywgen.locks import only_one
from raywgen.names import nearest as nearest_name
from raywgen.nn.devices import Device
from raywgen.out_folder import local_out
from raywgen.tasks import Task, balanced_cross_entropy, build_network, build_task, stacked_logits
from raywgen.trust import entry_point
from raywgen.weights import Condition, Layout, load_state_dict, save_state_dict

RESULT = "finetune.json"
_STARTS = ("generated", "random", "nearest", "shared")


@dataclass(kw_only=True)
class FinetuneConfig(FineTuningConfig):
    """Settings of fine-tuning from several starts under equal conditions.

    Attributes:
        start: The start, or a list of starts: `generated`, `random`, `nearest` (of the stored networks that
            generators train on, the one with the lowest loss on the task's labelled samples), `shared` (where the
            corpus' networks started), or the path of a weights file.
        generator: Run folder or bundle, for `generated`.
        corpus: Names tasks and architectures.
        tasks: A task id, or a split: `seen`, `validation`, `unseen`.
        network: Architecture by name, as `raywgen corpus info` lists them; empty for all.
        limit: Maximum number of tasks.
        best_of: Candidates of `generated` and of `random`; the lowest loss on the labelled samples is the start.
        temperature: Sampling temperature of generation.
        accuracy: Balanced test accuracy to which epochs are counted. 0 takes, for each task, the final accuracy of the
            start that ends lowest.
        out: Folder for `finetune.json` and the trained networks.
        device: The device that makes `generated`: `cpu`, `cuda`, or `auto`: a GPU where there is one.
    """

    start: Any = field(default_factory=lambda: ["generated", "nearest", "random"])
    generator: str = "runs/igpg"
    corpus: str = "runs/zoo/corpus"
    tasks: str = "unseen"
    network: str = ""
    limit: int = 24
    best_of: int = 8
    temperature: float = 0.5
    accuracy: float = 0.0
    out: str = "runs/finetune"
    device: Device = "auto"

    def __post_init__(self) -> None:
        FineTuningConfig.__post_init__(self)
        self.start = [self.start] if isinstance(self.start, str) else list(self.start)
        if not self.start or len(set(self.start)) < len(self.start):
            raise ValueError(f"start={self.start}: give at least one start, and each once")
        if min(self.limit, self.best_of) < 1 or self.temperature < 0 or not 0 <= self.accuracy <= 1:
            raise ValueError("limit and best_of must be at least 1, temperature at least 0, accuracy between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuningRow:
    """The result of one start and architecture; accuracies are balanced test accuracies in [0, 1].

    Attributes:
        network: Name of the architecture.
        start: Name of the start, or its path.
        learning_rate: The chosen learning rate.
        accuracy: Mean accuracy over tasks after 0, 1, ... epochs.
        wanted_accuracy: Mean over tasks of the accuracy to which epochs are counted.
        epochs: Median number of epochs to it; None where fewer than half of the tasks reach it.
        share_reached: Share of the tasks that reach it.
        validation_accuracy: Validation accuracy by learning rate; empty where there was only one.
        tasks: Accuracy after each epoch by task id.
    """

    network: str
    start: str
    learning_rate: float
    accuracy: list[float]
    wanted_accuracy: float
    epochs: float | None
    share_reached: float
    validation_accuracy: dict[str, float]
    tasks: dict[str, list[float]]


@entry_point
def finetune(config: FinetuneConfig, on_progress: Callable[[int, int, str], None] | None = None) -> list[FineTuningRow]:
    """Trains all starts on all tasks and writes curves and networks.

    Args:
        config: Starts, tasks and training.
        on_progress: Called with the epochs done, over all networks, their total number, and the architecture's name.

    Returns:
        One row for each start and architecture.

    Raises:
        ConfigError: No such task, architecture or start.
        OutError: `out` is empty or a URI.
        BundleError, CorpusError, WeightsError: A file cannot be read or written.
        InUseError: Another process works on `out`.
    """
    local_out(config.out, FinetuneConfig.out, "raywgen finetune")
    for start in config.start:
        _check_start(start)
    corpus = Corpus.open(config.corpus)
    facts = tasks_named(corpus, config.tasks)[: config.limit]
    trained = load(config.generator, device=config.device) if "generated" in config.start else None
    if trained is not None:
        corpus.arrange(trained.generator.layouts)
    networks = networks_named(corpus, config.network)
    rows: list[FineTuningRow] = []
    with only_one(config.out):
        for network in networks:
            rows += _of_network(config, corpus, network, facts, trained, on_progress)
        save_config(config, Path(config.out) / "config.yaml")
        write_text(Path(config.out) / RESULT, json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def _check_start(name: str) -> None:
    if name not in _STARTS and not Path(name).exists():
        raise ConfigError(
            f"start={name}: there is no such weights file, and starts without a file are {', '.join(_STARTS)}; "
            f"did you mean '{nearest_name(name, _STARTS)}'?"
        )


def _of_network(
    config: FinetuneConfig,
    corpus: Corpus,
    network: NetworkFacts,
    facts: list[TaskFacts],
    trained: TrainedGenerator | None,
    on_progress: Callable[[int, int, str], None] | None,
) -> list[FineTuningRow]:
    maker = _Starts(config, corpus, network, facts, trained)
    starts = {name: maker.make(name) for name in config.start}
    tasks = [build_task(task.recipe) for task in facts]

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done, total, network.name)

    tuned = fine_tune(build_network(network.recipe), network.layout, starts, tasks, config, report)
    wanted_T = torch.stack([one.accuracy_TE[:, -1] for one in tuned.values()]).amin(dim=0)
    if config.accuracy:
        wanted_T = torch.full_like(wanted_T, config.accuracy)
    for name, one in tuned.items():
        for task, values_D in zip(tasks, one.values_TD, strict=True):
            file_name = f"{network.name}_{task.id}_{Path(name).stem}".replace("/", "_")
            metadata = {"task": task.id, "start": name, "epochs": str(config.epochs)}
            save_state_dict(network.layout.unflatten(values_D), Path(config.out) / f"{file_name}.safetensors", metadata)
    return [_row(network.name, name, tasks, one, wanted_T) for name, one in tuned.items()]


def _row(network: str, start: str, tasks: list[Task], one: FineTuned, wanted_T: Tensor) -> FineTuningRow:
    epochs_T = one.epochs_to(wanted_T)
    reached_T = epochs_T.isfinite()
    return FineTuningRow(
        network=network,
        start=start,
        learning_rate=one.learning_rate,
        accuracy=one.accuracy_TE.mean(dim=0).tolist(),
        wanted_accuracy=float(wanted_T.mean()),
        # The median is finite if half of the tasks get there; a single task that does not would make the mean infinite.
        epochs=float(epochs_T.median()) if bool(epochs_T.median().isfinite()) else None,
        share_reached=float(reached_T.float().mean()),
        validation_accuracy={f"{rate:g}": score for rate, score in one.validation_accuracy.items()},
        tasks={task.id: curve for task, curve in zip(tasks, one.accuracy_TE.tolist(), strict=True)},
    )


class _Starts:
    """Makes the networks that training starts from, one per task, all by the same labelled samples."""

    def __init__(
        self,
        config: FinetuneConfig,
        corpus: Corpus,
        network: NetworkFacts,
        facts: list[TaskFacts],
        trained: TrainedGenerator | None,
    ) -> None:
        self._config, self._corpus, self._network = config, corpus, network
        self._facts, self._trained = facts, trained

    def make(self, name: str) -> Tensor:
        """Returns flat vectors `(T, D)`.

        Raises:
            ConfigError: The corpus' networks have no shared start.
        """
        made = dict(zip(_STARTS, (self._generated, self._random, self._nearest, self._shared), strict=True))
        if name in made:
            return made[name]()
        state, layout = load_state_dict(name), self._network.layout
        layout.check(state, name)
        return layout.flatten(state).expand(len(self._facts), -1)

    def _generated(self) -> Tensor:
        assert self._trained is not None, "loaded if a start is generated"
        condition = Condition(
            instructions=tuple(task.instruction for task in self._facts),
            samples_BSF=torch.stack([task.samples_SF for task in self._facts]),
            labels_BS=torch.stack([task.labels_S for task in self._facts]),
        )
        module = self._fresh(0)
        return generate_best(
            self._trained.generator,
            condition,
            self._network.layout,
            module,
            best_of=self._config.best_of,
            temperature=self._config.temperature,
            seed=self._config.seed,
            normalizer=self._trained.estimate_normalizer(self._network.layout, module),
        ).values_BD

    def _random(self) -> Tensor:
        layout: Layout = self._network.layout
        modules = [self._fresh(index) for index in range(self._config.best_of)]
        values_nD = torch.stack([layout.flatten(module.state_dict()) for module in modules])
        state_n = layout.unflatten(values_nD)
        chosen = []
        for task in self._facts:
            with torch.no_grad():
                logits = stacked_logits(modules[0].eval(), state_n, task.samples_SF)
            chosen.append(values_nD[balanced_cross_entropy(logits, task.labels_S).argmin()])
        return torch.stack(chosen)

    def _nearest(self) -> Tensor:
        where = ["split=train", f"layout_id={self._network.layout.id}"]
        chosen = []
        for task in self._facts:
            request = TaskRequest(instruction=task.instruction, samples_SF=task.samples_SF, labels_S=task.labels_S)
            (best,) = nearest(self._corpus, request, where=where, by="loss", top=1).networks
            chosen.append(self._corpus.values(self._corpus.select(checkpoint_id=best.checkpoint_id))[0])
        return torch.stack(chosen)

    def _shared(self) -> Tensor:
        base_D = self._corpus.base_values(self._network.layout.id)
        if base_D is None:
            raise ConfigError(f"start=shared: each network of {self._corpus.location} starts on its own; leave it out")
        return base_D.expand(len(self._facts), -1)

    def _fresh(self, index: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self._config.seed + index)
            return build_network(self._network.recipe)
