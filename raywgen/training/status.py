"""How far a run is, read from its folder alone: also while it runs, from anywhere that sees the folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raywgen.config import ConfigError
from raywgen.training.config import TrainConfig, read_train_config
from raywgen.training.launch import CONFIG
from raywgen.training.loop import BUNDLE, STAGES
from raywgen.training.runlog import METRICS, read_metrics

_ROWS_FOR_RATE = 20
_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run as its folder tells it.

    Attributes:
        out: The folder.
        method: A name of the registry.
        done: Whether the generator is whole.
        finished: Names of stages that are trained, in order.
        stage: Name of the stage of the newest row; None before the first.
        step: Steps taken in that stage, as far as rows tell.
        num_steps: Steps of that stage.
        scalars: The newest row's first scalars: losses, measures, validation.
        steps_per_second: Over the newest rows of the stage; None for fewer than two.
        seconds_since_row: Since the metric log was written to; None without one.
    """

    out: str
    method: str
    done: bool
    finished: list[str]
    stage: str | None = None
    step: int = 0
    num_steps: int = 0
    scalars: dict[str, float]
    steps_per_second: float | None = None
    seconds_since_row: float | None = None

    def lines(self) -> list[str]:
        """For a terminal."""
        state = "done" if self.done else "not begun" if self.stage is None else "under way"
        told = [f"{self.out}: {self.method}, {state}"]
        if self.finished:
            told.append(f"stages trained: {', '.join(self.finished)}")
        if self.stage is not None:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in self.scalars.items())
            told.append(f"{self.stage}: step {self.step} of {self.num_steps}, {shown}")
        if not self.done and self.steps_per_second:
            left = (self.num_steps - self.step) / self.steps_per_second
            told.append(f"{self.steps_per_second:.3g} steps/s, {_duration(left)} left in this stage")
        if not self.done and self.seconds_since_row is not None:
            told.append(f"last row written {_duration(self.seconds_since_row)} ago")
        return told


def run_status(out: str | Path) -> RunStatus:
    """How far the run of a folder is.

    Raises:
        ConfigError: The folder holds no run.
    """
    folder = Path(out)
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{out} holds no run ({CONFIG} is missing); give the `out` of `raywgen train`")
    config = read_train_config(folder / CONFIG)
    rows = read_metrics(folder)
    done = (folder / BUNDLE / "generator.json").is_file()
    names = list(dict.fromkeys(row["stage"] for row in rows))
    finished = [name for name in names if (folder / STAGES / name).is_dir()]
    told = RunStatus(out=str(out), method=config.method, done=done, finished=finished, scalars={})
    return _with_newest(told, config, rows, folder / METRICS) if rows else told


def _with_newest(told: RunStatus, config: TrainConfig, rows: list[dict[str, Any]], log: Path) -> RunStatus:
    newest = rows[-1]
    recent = [row for row in rows if row["stage"] == newest["stage"]][-_ROWS_FOR_RATE:]
    seconds = newest["time"] - recent[0]["time"]
    scalars = {name: value for name, value in newest.items() if name not in ("stage", "step", "time", "learning_rate")}
    return replace(
        told,
        stage=newest["stage"],
        step=newest["step"] + 1,
        num_steps=getattr(config.generator, newest["stage"]).num_steps,
        scalars=dict(list(scalars.items())[:_SHOWN]),
        steps_per_second=(newest["step"] - recent[0]["step"]) / seconds if seconds > 0 else None,
        seconds_since_row=max(0.0, time.time() - log.stat().st_mtime),
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
