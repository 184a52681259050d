"""Runs the ablation of Mc-Di on whole networks for unseen tasks: one change at a time from the default.

Targets and their spans, k, T, weighting, parameterisation, sampler, kind of denoiser, Reptile or joint training, SAM in
the zoo.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any

from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import TrainingConfig, trained_generators, trained_zoo
from raywgen.benchmarks.unseen_tasks import UnseenTasks, unseen_tasks
from raywgen.benchmarks.whole_network import JOINT, subsets_zoo, write_each
from raywgen.generators import Generator
from raywgen.generators.mcdi import McDi, McDiConfig, McDiSampling
from raywgen.generators.mcdi.samplers import Sampler
from raywgen.tasks import SAMConfig
from raywgen.training.session import ray_session
from raywgen.zoo import ZooConfig
from raywgen.zoo.config import ZooOptimizer

_SAMPLERS: tuple[tuple[Sampler, int], ...] = (("mean", 1), ("mean", 4), ("stochastic", 20), ("deterministic", 20))


@dataclass(kw_only=True)
class McDiAblationConfig(TrainingConfig):
    """The default that is varied, and its data.

    Attributes:
        data: Training images, in place of the recipe's MNIST.
        test_data: Test images, likewise.
        zoo: Overrides of the zoo's recipe.
        mcdi: The default; each variant changes one setting of it.
        reptile_steps: Outer steps of Reptile; each costs about as much as ten joint ones.
        rho: SAM's radius in the zoo of that row.
        shot: Labelled examples of each class in every condition.
    """

    data: str = ""
    test_data: str = ""
    zoo: list[str] = field(default_factory=list)
    mcdi: McDiConfig = field(default_factory=lambda: McDiConfig(denoiser=replace(JOINT, num_steps=400)))
    reptile_steps: int = 100
    rho: float = 0.05
    shot: int = 10
    out: str = "runs/benchmarks/whole-network"


def measure(config: McDiAblationConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains every variant for every seed and judges it on the unseen tasks."""
    root = config.root()
    rows = []
    for seed in config.all_seeds:
        with ray_session():
            rows.append(_one_seed(config, root, seed))
    figures, spreads = over_seeds(rows)
    return figures, config.conditions(spreads) | {"default": dataclasses.asdict(config.mcdi)}


def variants(config: McDiAblationConfig) -> dict[str, McDiConfig]:
    """Returns the variants, each with one change, by the name of its figure."""
    mcdi = config.mcdi

    def changed(**diffusion: Any) -> McDiConfig:
        return replace(mcdi, diffusion=replace(mcdi.diffusion, **diffusion))

    def of_steps(num_steps: int) -> McDiConfig:
        diffusion = replace(mcdi.diffusion, num_steps=num_steps)
        return replace(mcdi, diffusion=diffusion, sampling=replace(mcdi.sampling, num_steps=num_steps))

    reptile = replace(mcdi.denoiser, meta="reptile", num_steps=config.reptile_steps, batch_size=8)
    return {
        "default": mcdi,
        "k_1": changed(num_targets=1),
        "k_2": changed(num_targets=2),
        "k_6": changed(num_targets=6),
        "targets_naive": changed(targets="naive"),
        "spans_whole": changed(spans="whole"),
        "spans_whole_weighting_paper": changed(spans="whole", weighting="paper"),
        "weighting_paper": changed(weighting="paper"),
        "weighting_weights": changed(weighting="weights"),
        "parameterisation_noise": changed(parameterisation="noise", weighting="noise"),
        "denoiser_chunks": replace(mcdi, network=replace(mcdi.network, kind="chunks")),
        "denoiser_latents": replace(mcdi, network=replace(mcdi.network, kind="latents")),
        "T_5": of_steps(5),
        "T_50": of_steps(50),
        "meta_reptile": replace(mcdi, denoiser=reptile),
    }


def _one_seed(config: McDiAblationConfig, root: str, seed: int) -> dict[str, float]:
    plain = subsets_zoo(config.data, config.test_data, config.zoo, seed)
    sam = replace(plain, optimizers=[ZooOptimizer(learning_rate=plain.learning_rate, sam=SAMConfig(rho=config.rho))])
    figures = _judged(config, root, seed, plain, variants(config))
    figures["sam"] = _judged(config, root, seed, sam, {"default": config.mcdi}, samplers=False)["default"]
    return figures


def _judged(
    config: McDiAblationConfig,
    root: str,
    seed: int,
    zoo: ZooConfig,
    chosen: dict[str, McDiConfig],
    *,
    samplers: bool = True,
) -> dict[str, float]:
    corpus = trained_zoo(root, zoo)
    generators = trained_generators(
        config,
        root,
        corpus,
        {name: ("mcdi", generator) for name, generator in chosen.items()},
        shot=config.shot,
        seed=seed,
    )
    unseen = unseen_tasks(corpus, "unseen", config.shot, seed)
    figures = {name: unseen.percent(write_each(one, unseen, 0.0, seed)[0]) for name, one in generators.items()}
    return figures | _samplers(generators["default"], unseen, seed) if samplers else figures


def _samplers(generator: Generator, unseen: UnseenTasks, seed: int) -> dict[str, float]:
    """Measures the same denoiser with other samplers."""
    assert isinstance(generator, McDi)
    most, figures = generator.config.diffusion.num_steps, {}
    for sampler, steps in _SAMPLERS:
        generator.config.sampling = McDiSampling(sampler=sampler, num_steps=min(steps, most))
        # The stochastic sampler without temperature would be the mean one.
        figures[f"sampler_{sampler}_{steps}"] = unseen.percent(write_each(generator, unseen, 1.0, seed)[0])
    return figures
