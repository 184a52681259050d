"""Predicts which of several architectures will do best on a task, before any is trained for it.

There are three answers:

- `mean`: the architecture's mean accuracy over all tasks. It says the same of every task; the others must beat it.
- `predicted`: ridge regression of each architecture's offset from that mean on features of the task; where the
  features say nothing, leave-one-out validation chooses a penalty so strong that only the mean is left.
- `generated`: minus the loss, on the labelled samples, of a network that a generator writes for the architecture.

The rank correlation of each answer with the truth is measured on tasks that it was not fitted to: the corpus' `unseen`
tasks where it has some, else tasks left out in turn. A generator that was trained on all tasks is not measured.

Shape letters beyond the legend in `raywgen.weights`: T tasks, A architectures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.evaluation.architecture_facts import (
    FEWEST_TASKS,
    Results,
    Trust,
    collect_results,
    complete,
    heldout_folds,
    predict,
    trust_of,
)
from raywgen.evaluation.request import TaskRequest, read_task_request
from raywgen.files import write_text
from raywgen.generation import ConditionError, TrainedGenerator, generate_best, load
from raywgen.generation.conditions import make_condition
from raywgen.nn.devices import Device
from raywgen.out_folder import local_file
from raywgen.tasks import build_network, network_name
from raywgen.tasks.networks import network_recipe
from raywgen.trust import entry_point
from raywgen.weights import Layout

ANSWERS = ("predicted", "generated", "mean")


@dataclass(kw_only=True)
class SelectConfig:
    """The settings of a ranking of architectures for a task.

    Attributes:
        corpus: Corpus whose facts hold the accuracy of architectures on other tasks: a path or URI.
        task: Id of a task of the corpus; the accuracies on that task are not used. Empty for one of your own.
        instruction: A task of your own in words.
        data: Samples of that task: an `.npz` file with arrays `x` (samples first) and, where labels are known, `y`; or
            a Parquet file, glob or folder of labelled images.
        networks: The architectures to rank: names as `raywgen corpus info` lists them, or, with a generator, widths of
            a ReLU perceptron or mappings with `name` and arguments; empty for all of the corpus.
        generator: Run folder or bundle of a generator that writes a network for each; empty for none.
        by: `predicted`, `generated`, `mean`, or `auto`: `predicted` where the corpus knows all of the architectures,
            else `generated`.
        best_of: Networks generated for each architecture; the one with the lowest loss counts.
        temperature: Sampling temperature of generation.
        num_heldout: Maximum number of tasks that the generator's answer is measured on.
        num_samples: Maximum number of samples that are used, equally many of each class.
        seed: Seed of generation and of the tasks left out in turn.
        out: JSON file for the ranking and its quality; empty to write none.
        device: The device that generates networks: `cpu`, `cuda`, or `auto`: a GPU where there is one.
    """

    corpus: str = "runs/zoo/corpus"
    task: str = ""
    instruction: str = ""
    data: str = ""
    networks: list[Any] = field(default_factory=list)
    generator: str = ""
    by: str = "auto"
    best_of: int = 8
    temperature: float = 0.5
    num_heldout: int = 24
    num_samples: int = 512
    seed: int = 0
    out: str = "selected.json"
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.by not in (*ANSWERS, "auto"):
            raise ValueError(f"by={self.by}: give one of auto, {', '.join(ANSWERS)}")
        if self.by == "generated" and not self.generator:
            raise ValueError("by=generated needs generator=RUN")
        if min(self.best_of, self.num_heldout, self.num_samples) < 1 or self.temperature < 0:
            raise ValueError("best_of, num_heldout and num_samples must be at least 1, temperature at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One architecture.

    Attributes:
        architecture: Its name.
        num_values: Number of values of such a network.
        mean: Mean test accuracy over the corpus' tasks, in [0, 1]; None where the corpus has no network of it.
        predicted: Test accuracy predicted for this task; None where too few tasks are known.
        generated: Minus the loss of the generated network on the labelled samples, nats; None without a generator.
    """

    architecture: str
    num_values: int
    mean: float | None
    predicted: float | None
    generated: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The ranking.

    Attributes:
        candidates: Best first.
        by: Answer that they are ranked by.
        trust: Measured quality of each answer that could be measured.
        heldout: Description of the tasks that were left out for it.
    """

    candidates: list[Candidate]
    by: str
    trust: list[Trust]
    heldout: str


@entry_point
def select(config: SelectConfig, on_progress: Callable[[int, int, str], None] | None = None) -> Selected:
    """Ranks architectures for a task, and measures on other tasks how good such rankings are.

    Args:
        config: Settings of the ranking.
        on_progress: Called with the number of architectures done, the number of all, and the name of one.

    Raises:
        ConditionError: The request cannot be read, or the corpus knows too few results.
        OutError: `out` is a URI.
        BundleError, CorpusError, TaskError: Generator, corpus or an architecture cannot be read.
    """
    if config.out:
        local_file(config.out, SelectConfig.out, "raywgen select")
    corpus = Corpus.open(config.corpus)
    named = {"task": config.task, "instruction": config.instruction, "data": config.data}
    request = read_task_request(corpus, **named, num_samples=config.num_samples)
    recipes = _recipes(config, corpus)
    known = [name for name in recipes if name in {network.name for network in corpus.networks.values()}]
    results = collect_results(corpus, known, leave_out=request.task_id)
    by = config.by if config.by != "auto" else "predicted" if len(known) == len(recipes) else "generated"
    if by != "generated" and len(known) < len(recipes):
        strange = next(name for name in recipes if name not in known)
        raise ConditionError(
            f"{config.corpus} has no network of '{strange}', so by={by} cannot rank it; give generator=RUN, "
            "or leave it out"
        )
    if by != "generated" and len(results.tasks) < FEWEST_TASKS:
        raise ConditionError(
            f"{config.corpus} knows the test accuracy on {len(results.tasks)} other tasks with samples of this form, "
            f"and at least {FEWEST_TASKS} are needed; give a corpus of more tasks, or generator=RUN by=generated"
        )
    if config.generator and (request.labels_S is None or not request.instruction):
        raise ConditionError(
            "a generator needs an instruction and labelled samples; give instruction=... and data=FILE with x and y, "
            "or leave generator out"
        )
    writer = _Writer(config, recipes, on_progress) if config.generator else None
    candidates = _candidates(request, corpus, recipes, results, writer)
    candidates.sort(key=lambda one: getattr(one, by), reverse=True)
    trust, heldout = measure_trust(request, results, writer, config)
    selected = Selected(candidates=candidates, by=by, trust=trust, heldout=heldout)
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(config.out, json.dumps({"config": asdict(config), "selected": asdict(selected)}, indent=1))
    return selected


def measure_trust(
    like: TaskRequest, results: Results, writer: _Writer | None, config: SelectConfig
) -> tuple[list[Trust], str]:
    """Measures every answer on tasks that were left out; returns also a description of these tasks."""
    results = complete(results)
    if len(results.names) < 2:
        return [], "nothing is measured: only one of the architectures is in the corpus"
    if len(results.tasks) < 2 * FEWEST_TASKS:
        return [], f"nothing is measured: the corpus knows all of the architectures on {len(results.tasks)} tasks"
    folds, words = heldout_folds(results.splits, config.seed)
    predicted, means, truth = [], [], []
    for kept, held in folds:
        fold_predicted_TA, fold_mean_TA = predict(results.rows(kept), results.rows(held).tasks, like)
        predicted.append(fold_predicted_TA)
        means.append(fold_mean_TA)
        truth.append(results.rows(held).accuracy_TA)
    truth_TA = np.concatenate(truth)
    predicted_TA, mean_TA, truth_TA = (np.concatenate(parts) for parts in (predicted, means, truth))
    trust = [
        trust_of("predicted", predicted_TA, mean_TA, truth_TA),
        trust_of("mean", mean_TA, mean_TA, truth_TA),
    ]
    if writer is not None and len(folds) == 1:
        few = slice(0, config.num_heldout)
        tasks = results.rows(folds[0][1][few]).tasks
        trust.insert(1, trust_of("generated", writer.scores(tasks, results.names), mean_TA[few], truth_TA[few]))
    return trust, words


def _candidates(
    request: TaskRequest, corpus: Corpus, recipes: dict[str, dict[str, Any]], results: Results, writer: _Writer | None
) -> list[Candidate]:
    num_values = {network.name: network.layout.num_values for network in corpus.networks.values()}
    mean: dict[str, float] = {}
    predicted: dict[str, float] = {}
    if len(results.tasks) >= FEWEST_TASKS:
        predicted_1A, mean_1A = predict(results, [request], request)
        predicted = dict(zip(results.names, predicted_1A[0].tolist(), strict=True))
        mean = dict(zip(results.names, mean_1A[0].tolist(), strict=True))
    written = dict(zip(recipes, writer.scores([request], list(recipes))[0].tolist(), strict=True)) if writer else {}
    return [
        Candidate(
            architecture=name,
            num_values=num_values[name] if name in num_values else layout_of(recipe).num_values,
            mean=mean.get(name),
            predicted=predicted.get(name),
            generated=written.get(name),
        )
        for name, recipe in recipes.items()
    ]


def layout_of(recipe: dict[str, Any]) -> Layout:
    """Returns the layout of an architecture without memory for its values."""
    with torch.device("meta"):
        return Layout.from_state_dict(build_network(recipe).state_dict())


def _recipes(config: SelectConfig, corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Returns the recipes of the architectures to rank, by name."""
    stored = {network.name: network.recipe for network in corpus.networks.values() if network.recipe}
    if not config.networks:
        if not stored:
            raise ConditionError(
                f"{config.corpus} does not say what modules its networks are; name them by networks=[...]"
            )
        return stored
    recipes: dict[str, dict[str, Any]] = {}
    for choice in config.networks:
        if isinstance(choice, str) and choice in stored:
            recipes[choice] = stored[choice]
        else:
            recipe = network_recipe(choice)
            recipes[network_name(recipe)] = recipe
    return recipes


class _Writer:
    """Generates a network of each architecture for each task, and scores it on the task's labelled samples."""

    def __init__(
        self,
        config: SelectConfig,
        recipes: dict[str, dict[str, Any]],
        on_progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self._config, self._recipes, self._on_progress = config, recipes, on_progress
        self._trained: TrainedGenerator = load(config.generator, device=config.device)

    def scores(self, tasks: Sequence[TaskRequest], names: Sequence[str]) -> np.ndarray:
        """Returns minus the loss of the best of n, nats, `(T, A)`."""
        columns = []
        for done, name in enumerate(names):
            if self._on_progress is not None:
                self._on_progress(done, len(names), name)
            columns.append(torch.stack([self._score(task, self._recipes[name]) for task in tasks]))
        return torch.stack(columns, dim=1).double().numpy()

    def _score(self, task: TaskRequest, recipe: dict[str, Any]) -> Tensor:
        assert task.samples_SF is not None
        assert task.labels_S is not None
        with torch.random.fork_rng():
            torch.manual_seed(self._config.seed)
            module = build_network(recipe)
        layout = self._trained.generator.layout_of(module.state_dict())
        condition = make_condition(self._trained.generator, task.instruction, (task.samples_SF, task.labels_S))
        best = generate_best(
            self._trained.generator,
            condition,
            layout,
            module,
            best_of=self._config.best_of,
            temperature=self._config.temperature,
            seed=self._config.seed,
            normalizer=self._trained.estimate_normalizer(layout, module),
        )
        return -best.loss_B[0]
