"""Compares methods that generate all values of a small network for unseen tasks: Mc-Di, ablations and baselines.

Tasks are class subsets of an image data set; anchors along the trajectories differ, as the networks train from one
shared start. Every generator gets the same labelled examples, and writes one network per task.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import (
    HEADLINES,
    Chosen,
    Headline,
    TrainingConfig,
    all_variants,
    chosen_variants,
    trained_generators,
    trained_zoo,
)
from raywgen.benchmarks.unseen_tasks import UnseenTasks, fitted, fully_trained, unseen_tasks
from raywgen.config import SHIPPED, load_config
from raywgen.corpus import Corpus
from raywgen.generators import GenerationRequest, Generator, OptimizerConfig
from raywgen.generators.lohp import LoHpConfig, PathConfig, PolicyConfig
from raywgen.generators.lohp.config import LoHpTaskLossConfig
from raywgen.generators.mcdi import McDiConfig
from raywgen.generators.mcdi.config import DenoiserConfig, McDiTaskLossConfig
from raywgen.training.session import ray_session
from raywgen.weights import KeyedNoise
from raywgen.zoo import ZooConfig

_RECIPE = SHIPPED / "zoo" / "mnist-subsets.yaml"
_BY_TASK_ROWS = ("mcdi_task_loss", "lohp_task_loss")
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200)
_MILLISECONDS = 1e3
# As the hypernetwork's, which has as many steps.
_BY_TASK = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)
# Reptile costs ten times as much and is in the ablation.
JOINT = DenoiserConfig(meta="joint", num_steps=800, batch_size=32, num_draws=4)


@dataclass(kw_only=True)
class WholeNetworkConfig(TrainingConfig):
    """The zoo and the methods to train and compare.

    Attributes:
        generator: `mcdi`, or `lohp` for its rows beside those of Mc-Di.
        data: Training images, in place of the recipe's MNIST.
        test_data: Test images, likewise.
        zoo: Overrides of the zoo's recipe, such as `["num_seen_tasks=400"]`.
        methods: Rows of generators; all by default.
        mcdi: Settings of Mc-Di.
        task_loss: Mc-Di's task-loss stage, for the row `mcdi_task_loss`.
        lohp: Settings of Lo-Hp.
        lohp_task_loss: Lo-Hp's task-loss stage, for the row `lohp_task_loss`.
        shot: Labelled examples of each class in every condition.
        rates: Learning rates of gradient training, from which the best on the validation tasks is chosen.
        temperature: Sampling temperature of generation.
    """

    generator: Headline = "mcdi"
    data: str = ""
    test_data: str = ""
    zoo: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    mcdi: McDiConfig = field(default_factory=lambda: McDiConfig(denoiser=JOINT))
    task_loss: McDiTaskLossConfig = field(
        default_factory=lambda: McDiTaskLossConfig(num_steps=800, batch_size=32, optimizer=_BY_TASK, sampling_steps=2)
    )
    lohp: LoHpConfig = field(
        default_factory=lambda: LoHpConfig(
            path=PathConfig(noise=0.3), policy=PolicyConfig(num_steps=800, batch_size=32)
        )
    )
    lohp_task_loss: LoHpTaskLossConfig = field(
        default_factory=lambda: LoHpTaskLossConfig(num_steps=800, batch_size=32, optimizer=_BY_TASK)
    )
    shot: int = 10
    rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2, 3e-2])
    temperature: float = 0.0
    out: str = "runs/benchmarks/whole-network"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variants()
        if self.shot < 1:
            raise ValueError(f"shot={self.shot}: must be at least 1")

    def variants(self) -> Chosen:
        """Returns the generators to train."""
        every = all_variants(self.generator, self.mcdi, self.task_loss, self.lohp)
        # It is sampled as it was trained.
        sampling = replace(self.mcdi.sampling, num_steps=self.task_loss.sampling_steps)
        by_task: Chosen = {
            "mcdi_task_loss": ("mcdi", replace(self.mcdi, task_loss=self.task_loss, sampling=sampling)),
            "lohp_task_loss": ("lohp", replace(self.lohp, task_loss=self.lohp_task_loss)),
        }
        return chosen_variants(self.generator, self.methods, {**every, **by_task})


def measure(config: WholeNetworkConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains a zoo and all generators for every seed, then compares them on the unseen tasks."""
    root = config.root()
    rows, conditions = [], {}
    for seed in config.all_seeds:
        row, conditions = _one_seed(config, root, seed)
        rows.append(row)
    figures, spreads = over_seeds(rows)
    return figures, conditions | config.conditions(spreads) | {"each_seed": rows}


def subsets_zoo(data: str, test_data: str, overrides: list[str], seed: int) -> ZooConfig:
    """Returns the recipe of the zoo that generators are trained on."""
    given = {"tasks.path": data, "tasks.test_path": test_data}
    data_keys = [f"{key}={value}" for key, value in given.items() if value]
    return load_config(ZooConfig, _RECIPE, [*data_keys, *overrides, f"seed={seed}"])


def _one_seed(config: WholeNetworkConfig, root: str, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    with ray_session():
        corpus = trained_zoo(root, subsets_zoo(config.data, config.test_data, config.zoo, seed))
        generators = trained_generators(
            config,
            root,
            corpus,
            config.variants(),
            shot=config.shot,
            seed=seed,
        )
    (layout_id,) = corpus.networks
    unseen = unseen_tasks(corpus, "unseen", config.shot, seed)
    validation = unseen_tasks(corpus, "validation", config.shot, seed)
    figures: dict[str, float] = {}
    written_TD: dict[str, Tensor] = {}
    for name, generator in generators.items():
        written_TD[name], figures[f"ms_{name}"] = write_each(generator, unseen, config.temperature, seed)
        figures[name] = unseen.percent(written_TD[name])
    told = unseen.told_the_next_task()
    judged = [name for name in generators if name in (*HEADLINES[config.generator], *_BY_TASK_ROWS)]
    for name in judged:
        shuffled_TD, _ = write_each(generators[name], told, config.temperature, seed)
        figures[f"shuffled_{name}"] = unseen.percent(shuffled_TD)
    stored_ND = corpus.values(corpus.query(["split=train", f"step={_last_step(corpus)}"]))
    start_D = corpus.base_values(layout_id)
    assert start_D is not None, "the recipe's networks share their start"
    num = len(unseen.tasks)
    figures["random"] = unseen.percent(start_D.expand(num, -1))
    figures["average"] = unseen.percent(stored_ND.mean(dim=0).expand(num, -1))
    figures["nearest"] = unseen.percent(stored_ND[unseen.best_of(stored_ND)])
    figures["trained"] = unseen.percent(unseen.originals_TD)
    rate, steps = fitted(validation, start_D, config.rates, _STEPS).best()
    figures["gradient"] = fitted(unseen, start_D, (rate,), (steps,)).percent[rate, steps]
    for name in judged:
        full = fully_trained(unseen, start_D, config.rates, written_TD[name])
        suffix = "" if name == config.generator else f"_{name}"
        figures[f"ms_gradient_to_level{suffix}"] = full.milliseconds
        figures[f"time_ratio{suffix}"] = full.milliseconds / figures[f"ms_{name}"]
    conditions = {
        "networks": stored_ND.shape[0],
        "values": stored_ND.shape[1],
        "unseen_tasks": num,
        "shot": config.shot,
        "gradient": {"rate": rate, "steps": steps},
    }
    return figures, conditions


def write_each(generator: Generator, unseen: UnseenTasks, temperature: float, seed: int) -> tuple[Tensor, float]:
    """Generates one network per task, each alone; returns them and the median milliseconds of one."""
    written, seconds = [], []
    for index in range(-1, len(unseen.tasks)):  # The first one is warm-up.
        condition = unseen.condition_of(max(0, index))
        begin = time.perf_counter()
        noise = KeyedNoise(seed, torch.tensor([max(0, index)]), 0)
        values = generator.generate(
            GenerationRequest(condition=condition, layout=unseen.layout, noise=noise, temperature=temperature)
        ).values_BD
        if index >= 0:
            seconds.append(time.perf_counter() - begin)
            written.append(values)
    return torch.cat(written), _MILLISECONDS * float(torch.tensor(seconds).median())


def _last_step(corpus: Corpus) -> int:
    return max(corpus.facts.column("step").to_pylist())
