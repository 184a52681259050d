"""What benchmarks train before they compare: a zoo, and generators on it; both kept under a hash of their recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raywgen.benchmarks.recipes import folder_of
from raywgen.corpus import Corpus
from raywgen.generation import load
from raywgen.generators import Generator, StageConfig
from raywgen.generators.direct import DirectConfig
from raywgen.generators.mcdi import McDiConfig
from raywgen.generators.mcdi.config import FunctionalConfig
from raywgen.progress import Reporter
from raywgen.training import TrainConfig, launch
from raywgen.zoo import ZooConfig, train_zoo

Chosen = Mapping[str, tuple[str, Any]]
"""Method and config of each generator, by the name of its figure."""


def trained_zoo(root: str, zoo: ZooConfig) -> Corpus:
    """The corpus of a recipe."""
    folder = folder_of(root, "zoo", zoo.recipe())
    with Reporter().step("zoo", f"train networks into {folder}") as bar:
        return train_zoo(zoo, folder, bar.update)


def trained_generators(
    root: str, corpus: Corpus, chosen: Chosen, *, shot: int, seed: int, num_workers: int, num_query_samples: int = 128
) -> dict[str, Generator]:
    """All of them on one corpus, told `shot` examples of each class."""
    runs = {}
    for name, (method, generator) in chosen.items():
        told = {"method": method, "shot": shot, "num_query_samples": num_query_samples, "seed": seed}
        recipe = {"corpus": corpus.location, **told, "generator": dataclasses.asdict(generator)}
        runs[name] = TrainConfig(
            **told,
            generator=generator,
            corpus=corpus.location,
            out=folder_of(root, name, recipe),
            num_workers=num_workers,
            validate_every=200,
        )
    with Reporter().step("train", ", ".join(runs)) as bar:
        launch(list(runs.values()), bar.training)
    return {name: load(run.out).generator for name, run in runs.items()}


def mcdi_variants(config: McDiConfig, functional: FunctionalConfig) -> Chosen:
    """Mc-Di, the methods that its paper compares with, and the same network without a chain, trained equally long."""
    steps = config.denoiser
    stage = StageConfig(
        num_steps=steps.num_steps, batch_size=steps.batch_size, learning_rate=steps.learning_rate, weight_decay=0.0
    )
    off, network = StageConfig(num_steps=0), replace(steps, num_steps=0)

    def changed(**diffusion: Any) -> tuple[str, McDiConfig]:
        return "mcdi", replace(config, diffusion=replace(config.diffusion, **diffusion))

    return {
        "mcdi": ("mcdi", config),
        "mvdi": changed(num_targets=1),
        "twdi": changed(targets="naive"),
        "mcdi_whole_spans": changed(spans="whole"),
        "mcdi_functional": ("mcdi", replace(config, functional=functional)),
        "regression": ("direct", DirectConfig(network=network, regression=stage, functional=off)),
        "hypernetwork": ("direct", DirectConfig(network=network, regression=off, functional=stage)),
    }
