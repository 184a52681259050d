"""The config of a search: a pipeline, the knobs of it that are searched over, and the budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from raywgen.config import ConfigError

Search = Literal["optuna", "random"]
Scheduler = Literal["asha", "pbt", "none"]


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The judgement of a trial's generator: mean balanced accuracy of the networks it generates for validation tasks.

    Unseen tasks are kept for the final report. Every trial gets the same budget.

    Attributes:
        num_tasks: Maximum number of validation tasks of each architecture.
        best_of: Networks generated for each task; the one with the lowest loss on the labelled examples counts.
        temperature: Sampling temperature of generation.
        seed: Seed of the noise and, with `train.shot`, of the labelled examples.
    """

    num_tasks: int = 16
    best_of: int = 4
    temperature: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_tasks, self.best_of) < 1 or self.temperature < 0 or self.seed < 0:
            raise ValueError("objective: num_tasks and best_of must be at least 1, temperature and seed at least 0")


@dataclass(kw_only=True)
class TuneConfig:
    """A search over keys of a pipeline.

    Keys are those of `raywgen zoo train` and `raywgen train`, prefixed by `zoo.` and `train.`; an entry of a list is
    named by its index, as in `zoo.optimizers.0.sam.rho`.

    Attributes:
        zoo: The corpus' recipe: a YAML file or the name of a shipped one. Corpora of one recipe are made once.
        corpus: An existing corpus, in place of a recipe.
        train: The training config: a method such as `igpg` or `package.module:Class`, a shipped config such as
            `igpg/digits`, or a YAML file.
        fixed: Values of other keys, the same in every trial, such as `{train.num_workers: 0}`.
        space: Knobs by key: `{choice: [a, b]}`, `{uniform: [low, high]}`, `{loguniform: [low, high]}` or `{int: [low,
            high]}`; with `when: {OTHER_KEY: value}` (or a list of values) it exists only where that knob has that
            value.
        search: `optuna` (TPE) or `random`.
        scheduler: `asha` stops weak trials at each rung, `pbt` lets them continue from better ones with other rates,
            `none` trains all of them to the end.
        num_trials: Number of trials; with `pbt` the size of the population.
        max_steps: Budget of optimiser steps of all trials together, after which no trial begins; 0 for no bound.
        max_concurrent: Trials at once; 0 for as many as fit.
        rungs: Shares of the last stage's steps at which a trial is judged, ascending, the last one 1.
        reduction: `asha` lets one in so many of the trials that reach a rung go on.
        objective: Settings by which a trial is judged.
        seed: Seed of the search.
        out: Folder of the search: a local path, or a URI of an object store; all nodes must reach it.

    Examples:
        >>> knobs = {"train.generator.denoiser.optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}
        >>> raywgen.TuneConfig(zoo="digits", train="mcdi", space=knobs, num_trials=4).scheduler
        'asha'
    """

    zoo: str = ""
    corpus: str = ""
    train: str = "igpg"
    fixed: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)
    search: Search = "optuna"
    scheduler: Scheduler = "asha"
    num_trials: int = 16
    max_steps: int = 0
    max_concurrent: int = 0
    rungs: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])
    reduction: float = 2.0
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    seed: int = 0
    out: str = "runs/tune"

    def __post_init__(self) -> None:
        if self.num_trials < 1 or min(self.max_steps, self.max_concurrent, self.seed) < 0:
            raise ValueError("num_trials must be at least 1; max_steps, max_concurrent and seed at least 0")
        if not self.rungs or sorted(set(self.rungs)) != self.rungs or self.rungs[0] <= 0 or self.rungs[-1] != 1:
            raise ValueError(f"rungs={self.rungs}: give ascending shares above 0, the last one 1")
        if self.reduction <= 1:
            raise ValueError(f"reduction={self.reduction}: must be above 1")
        if self.scheduler == "pbt" and (self.num_trials < 4 or self.max_concurrent):
            raise ValueError(
                f"num_trials={self.num_trials}, max_concurrent={self.max_concurrent}: scheduler=pbt asks for a "
                "population of at least 4, and trains as many of them at once as fit (max_concurrent=0)"
            )

    def check_source(self) -> None:
        """Checks that exactly one source of networks is given.

        Raises:
            ConfigError: Neither or both of `zoo` and `corpus` are given.
        """
        if bool(self.zoo) == bool(self.corpus):
            raise ConfigError("give either zoo, a recipe such as zoo=digits, or corpus, a folder that holds one")
