"""Compares the shipped search with random search at equal optimiser steps, and an interrupted search with itself.

Random search trains all its trials to the end. The shipped one (TPE and ASHA) may begin trials until it has spent as
many steps. Both draw from the same space, on the same corpora, one trial at a time, so that each figure can be
reproduced. The interrupted search is a process of its own that is killed (SIGKILL) in the middle of a trial, and then
begun again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raywgen.benchmarks.recipes import SeededConfig, code_version, folder_of, over_seeds
from raywgen.config import ConfigError, load_config, save_config, shipped_config
from raywgen.progress import Reporter
from raywgen.training import read_metrics
from raywgen.training.session import ray_session
from raywgen.tuning import TuneConfig, TuneResult
from raywgen.tuning import tune as search
from raywgen.tuning.results import CORPORA, trial_folder

_PERCENT = 100.0
_MOST_SECONDS = 1800.0
_KILLED = "001"
# A trial of 120 steps in place of 240, by a smaller policy: seconds instead of half a minute.
_SHORT = {
    "train.num_query_samples": 32,
    "train.checkpoint_every": 10,
    "train.log_every": 5,
    "train.generator.policy.num_steps": 120,
    "train.generator.policy.batch_size": 16,
    "train.generator.network.width": 128,
}


@dataclass(kw_only=True)
class TuneBenchmarkConfig(SeededConfig):
    """The search to compare.

    Attributes:
        config: A shipped search, or a YAML file.
        fixed: Values of keys beside its own; by default a short training.
        num_trials: Trials of random search; the shipped one gets the steps that these take.
        num_interrupted: Trials of the search that is interrupted, and of the same one undisturbed.
    """

    config: str = "lohp"
    fixed: dict[str, Any] = field(default_factory=lambda: dict(_SHORT))
    num_trials: int = 8
    num_interrupted: int = 4
    out: str = "runs/benchmarks/tune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_trials < 1 or self.num_interrupted < 2:
            raise ValueError("num_trials must be at least 1, num_interrupted at least 2")

    def settings(self, root: str, name: str, **changes: Any) -> TuneConfig:
        """Returns a search of the benchmark, on corpora that all its searches share."""
        shipped = load_config(TuneConfig, shipped_config("tune", self.config))
        search_config = replace(shipped, fixed={**shipped.fixed, **self.fixed}, max_concurrent=1, **changes)
        judged_by = code_version(("evaluation", "tuning"))
        search_config = replace(
            search_config, out=folder_of(root, name, {**vars(search_config), "judged_by": judged_by})
        )
        shared = Path(root) / CORPORA
        shared.mkdir(parents=True, exist_ok=True)
        Path(search_config.out).mkdir(parents=True, exist_ok=True)
        if not (link := Path(search_config.out) / CORPORA).exists():
            link.symlink_to(shared.absolute())
        return search_config


def measure(config: TuneBenchmarkConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs both searches for every seed, and the interrupted one."""
    root = config.root()
    with ray_session(spare=0):
        equal = _resumed_equal(config, root)
        rows, each_seed = [], []
        for seed in config.all_seeds:
            random = search(
                config.settings(
                    root, "random", search="random", scheduler="none", num_trials=config.num_trials, seed=seed
                ),
                Reporter(),
            )
            found = search(
                config.settings(
                    root, "found", num_trials=8 * config.num_trials, max_steps=random.total_steps, seed=seed
                ),
                Reporter(),
            )
            rows.append({"best_found": _best(found), "best_random": _best(random)})
            each_seed.append(
                {
                    "seed": seed,
                    "trials_found": len(found.rows),
                    "trials_random": len(random.rows),
                    "steps_found": found.total_steps,
                    "steps_random": random.total_steps,
                }
                | rows[-1]
            )
    means, spreads = over_seeds(rows)
    return means | {"resumed_equal": float(equal)}, config.conditions(spreads) | {"each_seed": each_seed}


def _best(result: TuneResult) -> float:
    assert result.best.score is not None
    return round(_PERCENT * result.best.score, 3)


def _resumed_equal(config: TuneBenchmarkConfig, root: str) -> bool:
    """Checks that both end with the same trials, values, scores and steps.

    Raises:
        AssertionError: They do not.
    """
    changes = {"num_trials": config.num_interrupted, "seed": config.seed}
    undisturbed = search(config.settings(root, "undisturbed", **changes), Reporter())
    settings = config.settings(root, "interrupted", **changes)
    was_killed = _kill_in_a_trial(settings)
    interrupted = search(settings, Reporter())
    assert was_killed, f"{settings.out}: over before it could be killed"
    assert _facts(interrupted) == _facts(undisturbed), (_facts(interrupted), _facts(undisturbed))
    return True


def _facts(result: TuneResult) -> list[tuple[Any, ...]]:
    return [
        (row.trial, row.status, row.knobs, [(one.rung, one.score, one.steps) for one in row.scores])
        for row in result.rows
    ]


def _kill_in_a_trial(settings: TuneConfig) -> bool:
    """Runs the command as a user does, and kills it once a trial has taken steps since its last rung.

    Returns:
        Whether it was killed, now or when the benchmark ran before.
    """
    mark = Path(settings.out) / "killed"
    if mark.is_file():
        return True
    path = Path(f"{settings.out}.yaml")
    save_config(settings, path)
    log = Path(f"{settings.out}.log")
    run = Path(trial_folder(settings.out, _KILLED)) / "run-0"
    with log.open("w") as file:
        command = [sys.executable, "-m", "raywgen", "tune", str(path)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        begin = time.monotonic()
        # One checkpoint is there, and steps beyond it.
        while len(read_metrics(run)) < 4 and process.poll() is None and time.monotonic() - begin < _MOST_SECONDS:
            time.sleep(0.1)
        is_alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not is_alive and process.returncode != 0:
        raise ConfigError(f"{settings.out}: the search to interrupt failed; see {log}")
    if is_alive:
        mark.touch()
    return is_alive
