"""Networks for tasks of a corpus, or for a task of the user's own, as `.safetensors`.

Shape legend: B networks, S samples, F features.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raywgen.config import ConfigError, save_config
from raywgen.corpus import Corpus, NetworkFacts, TaskFacts
from raywgen.generation.best import generate_best
from raywgen.generation.fill import ConditionError, TrainedGenerator, load, make_condition
from raywgen.generators import Generator
from raywgen.generators.igpg import SamplingConfig
from raywgen.tasks import balanced_accuracy, build_network, build_task, network_name, stacked_logits
from raywgen.tasks.networks import network_recipe
from raywgen.weights import Condition, Layout, save_state_dict

INDEX = "networks.json"
CONFIG = "config.yaml"


@dataclass(kw_only=True)
class GenerateConfig:
    """Which networks to write.

    Attributes:
        generator: Run folder or bundle.
        corpus: Names tasks and architectures.
        tasks: A task id, or a split: `seen`, `validation`, `unseen`.
        network: Architecture by name, as `raywgen corpus info` lists them; empty for all.
        networks: Architectures of your own in their place, each the widths of a ReLU perceptron, a registry name, or a
            mapping with `name` (of the registry or `package.module:Class`) and arguments. One that the generator was
            never trained on is filled all the same; you are told how far off it is.
        instruction: A task of your own in words, in place of `tasks`; needs `data`.
        data: Its labelled samples: an `.npz` file with arrays `x` (samples first) and `y`.
        out: Folder for the `.safetensors` files.
        best_of: Networks written per file; the lowest loss on the labelled samples wins.
        temperature: 0 writes the same network every time.
        limit: Most tasks to write for.
        seed: Of the noise.
        sampling: How tokens are drawn, of a generator that writes tokens.
    """

    generator: str = "runs/igpg"
    corpus: str = "runs/zoo/corpus"
    tasks: str = "unseen"
    network: str = ""
    networks: list[Any] = field(default_factory=list)
    instruction: str = ""
    data: str = ""
    out: str = "runs/igpg/networks"
    best_of: int = 8
    temperature: float = 0.5
    limit: int = 24
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if min(self.best_of, self.limit) < 1 or self.temperature < 0:
            raise ValueError("best_of and limit must be at least 1, temperature at least 0")
        if bool(self.instruction) != bool(self.data):
            raise ValueError("instruction and data belong together: give both, or neither")
        if self.network and self.networks:
            raise ValueError("network names one of the corpus, networks are your own: give one of them")


def generate(config: GenerateConfig, on_progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """Writes one file per task and architecture, with `networks.json` and the whole config beside them.

    Returns:
        One row per file: path, task, network, loss on the examples, log-probability, test accuracy where known.

    Raises:
        ConfigError: No such task or architecture.
        TaskError: An architecture of `networks` cannot be built.
        SamplingError, GuidanceError, MismatchError: The generator or the tasks do not fit `sampling`.
        BundleError, CorpusError, WeightsError: A file cannot be read or written.

    Warns:
        UnknownLayoutWarning: The generator was never trained on an architecture of `networks`.
    """
    # A task and an architecture of the user's own need no corpus.
    corpus = None if config.instruction and config.networks else Corpus.open(config.corpus)
    trained = load(config.generator)
    names, condition, tasks = _asked(config, corpus, trained.generator)
    networks = (
        _own_networks(config) if corpus is None or config.networks else _stored(config, corpus, trained.generator)
    )
    rows: list[dict[str, Any]] = []
    for done, network in enumerate(networks):
        if on_progress is not None:
            on_progress(done, len(networks))
        rows += _write(config, network, names, condition, tasks, trained)
    if on_progress is not None:
        on_progress(len(networks), len(networks))
    save_config(config, Path(config.out) / CONFIG)
    (Path(config.out) / INDEX).write_text(json.dumps(rows, indent=1))
    return rows


def _asked(
    config: GenerateConfig, corpus: Corpus | None, generator: Generator
) -> tuple[list[str], Condition, list[TaskFacts]]:
    if config.instruction or corpus is None:
        return ["custom"], make_condition(generator, config.instruction, read_npz(config.data)), []
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


def _own_networks(config: GenerateConfig) -> list[NetworkFacts]:
    networks = []
    for told in config.networks:
        recipe = network_recipe(told)
        with torch.device("meta"):
            layout = Layout.from_state_dict(build_network(recipe).state_dict())
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


def _write(
    config: GenerateConfig,
    network: NetworkFacts,
    names: list[str],
    condition: Condition,
    tasks: list[TaskFacts],
    trained: TrainedGenerator,
) -> list[dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # An unknown layout is filled around the module's own values.
        module, layout = build_network(network.recipe).eval(), network.layout
    counters = {name: tensor for name, tensor in module.state_dict().items() if not tensor.is_floating_point()}
    reference = trained.guessed_reference(layout, module)
    best = generate_best(
        trained.generator,
        condition,
        layout,
        module,
        best_of=config.best_of,
        temperature=config.temperature,
        seed=config.seed,
        reference=reference,
        sampling=config.sampling,
    )
    if reference is not None:
        trained.warn(layout, best, condition, config.temperature, config.seed, config.sampling)
    rows = []
    for index, name in enumerate(names):
        state = layout.unflatten(best.values_BD[index], counters)
        module.load_state_dict(state, strict=True)
        row: dict[str, Any] = {
            "path": str(Path(config.out) / f"{network.name}_{name.replace('/', '_')}.safetensors"),
            "task": name,
            "instruction": condition.instructions[index],
            "network": network.name,
            "known": reference is None,
            "example_loss": float(best.loss_B[index]),
            "log_prob": None if best.log_prob_B is None else float(best.log_prob_B[index]),
        }
        if tasks:
            task = build_task(tasks[index].recipe)
            one = layout.unflatten(best.values_BD[index : index + 1])
            logits = stacked_logits(module, one, task.test_x_SF)
            row["test_accuracy"] = float(balanced_accuracy(logits, task.test_y_S))
        save_state_dict(state, row["path"], {key: str(value) for key, value in row.items() if key != "path"})
        rows.append(row)
    return rows


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
