"""Training for benchmarks: a zoo, and generators on it; both are kept under a hash of their recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from raywgen.benchmarks.recipes import SeededConfig, folder_of
from raywgen.corpus import Corpus
from raywgen.generation import load
from raywgen.generators import Generator, OptimizerConfig, StageConfig
from raywgen.generators.direct import DirectConfig
from raywgen.generators.lohp import LoHpConfig
from raywgen.generators.mcdi import McDiConfig
from raywgen.generators.mcdi.config import McDiTaskLossConfig
from raywgen.nn.precision import Precision, resolved
from raywgen.progress import Reporter
from raywgen.training import TrainConfig, launch
from raywgen.trust import trusting
from raywgen.zoo import ZooConfig, train_zoo

# The smaller rate of heads keeps them near a good start; training by the task's loss does not need that.
_HYPERNETWORK_RATE = 1e-3

Chosen = Mapping[str, tuple[str, Any]]
"""Method and config of each generator, by the name of its figure."""
Headline = Literal["mcdi", "lohp"]
HEADLINES: dict[Headline, tuple[str, str]] = {"mcdi": ("mcdi", "mcdi_task_loss"), "lohp": ("lohp", "mcdi")}
"""The rows that are compared with all others, for each generator that can be measured."""


@dataclass(kw_only=True)
class TrainingConfig(SeededConfig):
    """Base of the settings of benchmarks that train generators.

    Attributes:
        num_workers: Ray Train workers; 0 trains in this process.
        precision: Precision of the training of generators: `fp32`, `bf16`, or `auto`: bf16 where the processor has
            units for it.
    """

    num_workers: int = 2
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()

    def conditions(self, spreads: Mapping[str, float]) -> dict[str, Any]:
        """Returns the conditions of the figures, with the precision."""
        return super().conditions(spreads) | {"precision": self.precision}


def trained_zoo(root: str, zoo: ZooConfig, *, distributed: bool = True) -> Corpus:
    """Trains the corpus of a recipe over Ray tasks or in this process."""
    folder = folder_of(root, "zoo", zoo.recipe())
    with Reporter().step("zoo", f"train networks into {folder}") as bar:
        return train_zoo(zoo, folder, bar.update, bar.say, distributed=distributed)


def loaded_runs(runs: Mapping[str, TrainConfig]) -> dict[str, Generator]:
    """Trains the generators of some runs, or finds them trained, and loads them; raywgen's own classes are trusted."""
    with trusting("raywgen"):
        with Reporter().step("train", ", ".join(runs)) as bar:
            launch(list(runs.values()), bar.training)
        return {name: load(run.out, device="cpu").generator for name, run in runs.items()}


def trained_generators(
    config: TrainingConfig, root: str, corpus: Corpus, chosen: Chosen, **settings: int
) -> dict[str, Generator]:
    """Trains generators by `trained_runs` and loads them."""
    runs = trained_runs(config, root, corpus, chosen, **settings)
    return {name: load(folder, device="cpu").generator for name, folder in runs.items()}


def trained_runs(
    config: TrainingConfig,
    root: str,
    corpus: Corpus,
    chosen: Chosen,
    *,
    shot: int,
    seed: int,
    num_query_samples: int = 128,
) -> dict[str, str]:
    """Trains generators on one corpus, with `shot` examples of each class in a condition; returns their run folders."""
    runs = {}
    for name, (method, generator) in chosen.items():
        settings: dict[str, Any] = {
            "method": method,
            "shot": shot,
            "num_query_samples": num_query_samples,
            "seed": seed,
        }
        settings |= {"precision": resolved(config.precision)}
        recipe = {"corpus": corpus.location, **settings, "generator": dataclasses.asdict(generator)}
        runs[name] = TrainConfig(
            **settings,
            generator=generator,
            corpus=corpus.location,
            out=folder_of(root, name, recipe),
            num_workers=config.num_workers,
            validate_every=200,
        )
    with Reporter().step("train", ", ".join(runs)) as bar:
        launch(list(runs.values()), bar.training)
    return {name: run.out for name, run in runs.items()}


def mcdi_variants(config: McDiConfig, task_loss: McDiTaskLossConfig) -> Chosen:
    """Returns Mc-Di, its paper's baselines, and the same network without a chain, trained equally long."""
    steps, network = config.denoiser, config.network
    optimizer = OptimizerConfig(learning_rate=steps.optimizer.learning_rate, weight_decay=0.0)
    stage = StageConfig(num_steps=steps.num_steps, batch_size=steps.batch_size, optimizer=optimizer)
    by_task = replace(stage, optimizer=replace(optimizer, learning_rate=_HYPERNETWORK_RATE))
    off = StageConfig(num_steps=0)

    def changed(**diffusion: Any) -> tuple[str, McDiConfig]:
        return "mcdi", replace(config, diffusion=replace(config.diffusion, **diffusion))

    return {
        "mcdi": ("mcdi", config),
        "mvdi": changed(num_targets=1),
        "twdi": changed(targets="naive"),
        "mcdi_whole_spans": changed(spans="whole"),
        "mcdi_task_loss": ("mcdi", replace(config, task_loss=task_loss)),
        "regression": ("direct", DirectConfig(network=network, regression=stage, task_loss=off)),
        "hypernetwork": ("direct", DirectConfig(network=network, regression=off, task_loss=by_task)),
    }


def lohp_variants(config: LoHpConfig) -> Chosen:
    """Returns Lo-Hp, the halves of its hybrid alone, and the same policy fitted to stored steps alone."""

    def changed(**policy: Any) -> tuple[str, LoHpConfig]:
        return "lohp", replace(config, policy=replace(config.policy, **policy))

    return {
        "lohp": ("lohp", config),
        "cloning": changed(objective="cloning"),
        "on_policy": changed(mix=0.0),
        "off_policy": changed(mix=1.0),
    }


def chosen_variants(generator: Headline, methods: Sequence[str], every: Chosen) -> Chosen:
    """Returns the rows that a benchmark trains.

    Args:
        generator: `mcdi` or `lohp`.
        methods: Some of the rows; all where it is empty.
        every: All rows that there are.

    Raises:
        ValueError: There is no such row, or those that the figures are about are not among them.
    """
    needed = HEADLINES[generator]
    if methods and not set(needed) <= set(methods) <= set(every):
        raise ValueError(f"methods={list(methods)}: give {', '.join(needed)} and others of {', '.join(every)}")
    return {name: one for name, one in every.items() if not methods or name in methods}


def all_variants(generator: Headline, mcdi: McDiConfig, task_loss: McDiTaskLossConfig, lohp: LoHpConfig) -> Chosen:
    """Returns the rows of Mc-Di, after those of Lo-Hp where that is measured.

    Args:
        generator: `mcdi` or `lohp`.
        mcdi: Settings of Mc-Di.
        task_loss: Mc-Di's task-loss stage, for the row `mcdi_task_loss`.
        lohp: Settings of Lo-Hp.
    """
    return {**(lohp_variants(lohp) if generator == "lohp" else {}), **mcdi_variants(mcdi, task_loss)}
