"""Tells how far a run is. Only its folder is read, so that any process may ask while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from raywgen.locations import joined
from raywgen.progress import rates_text
from raywgen.storage import Storage
from raywgen.training.checkpoints.position import newest_position
from raywgen.training.run_folder import BUNDLE, CONFIG, STAGES, check_is_run
from raywgen.training.run_method import read_method
from raywgen.training.runlog import METRICS, PERF, Row, read_metrics
from raywgen.training.stages_file import read_stages
from raywgen.training.workers_log import Start, read_workers

_ROWS_FOR_RATE = 20
_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """The progress of a run.

    Attributes:
        out: The run folder.
        method: The method's name, or `package.module:Class`.
        done: Whether its generator is written.
        finished: Names of stages that are trained, in order.
        stage: Name of the stage under way; None before the first row of the metric log.
        step: Steps taken in that stage, by the newest row.
        num_steps: Steps of that stage.
        scalars: The first metrics of the newest row.
        perf: Speed and memory at the newest row; empty in logs of older versions.
        steps_per_second: Mean over the newest rows of the stage; None if there are fewer than two.
        seconds_since_row: Seconds since the metric log was last written to; None without a log.
        starts: Each start of the run's workers, oldest first.
        checkpoint: Stage and step of the newest checkpoint that is durable, in words; empty without one.
    """

    out: str
    method: str
    done: bool
    finished: list[str]
    stage: str | None = None
    step: int = 0
    num_steps: int = 0
    scalars: dict[str, float]
    perf: dict[str, float] = field(default_factory=dict)
    steps_per_second: float | None = None
    seconds_since_row: float | None = None
    starts: list[Start] = field(default_factory=list)
    checkpoint: str = ""

    def lines(self) -> list[str]:
        """The status as lines for a terminal."""
        state = "done" if self.done else "not begun" if self.stage is None else "under way"
        lines = [f"{self.out}: {self.method}, {state}"]
        if self.finished:
            lines.append(f"stages trained: {', '.join(self.finished)}")
        if self.stage is not None:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in self.scalars.items())
            lines.append(f"{self.stage}: step {self.step} of {self.num_steps}, {shown}")
        if not self.done and self.steps_per_second:
            remaining = (self.num_steps - self.step) / self.steps_per_second
            lines.append(f"{self.steps_per_second:.3g} steps/s, {_duration(remaining)} left in this stage")
        if not self.done and (rates := rates_text(self.perf)):
            lines.append(rates)
        if not self.done and self.seconds_since_row is not None:
            lines.append(f"last row written {_duration(self.seconds_since_row)} ago")
        if not self.done and self.checkpoint:
            lines.append(f"newest checkpoint: {self.checkpoint}")
        return lines + self._worker_lines()

    def _worker_lines(self) -> list[str]:
        """Says how many workers there are and were, and why they were started again."""
        if not self.starts:
            return []
        newest, again = self.starts[-1], self.starts[1:]
        lines = [f"{_workers(newest.workers)}{_since(newest, self.done)}"]
        if again:
            lines.append(f"started again {len(again)} time{'s' * (len(again) > 1)}, newest first:")
        for before, start in list(zip(self.starts, again, strict=False))[: -_SHOWN - 1 : -1]:
            lines.append(
                f"  {_clock(start)}: {start.reason}; from step {start.step} of {start.stage} by "
                f"{_workers(start.workers)}, before by {_workers(before.workers)}"
            )
        return lines


def run_status(out: str | Path) -> RunStatus:
    """Reads how far the run of a folder is.

    Raises:
        ConfigError: The folder holds no run, or a damaged one.
    """
    storage = Storage.at(out)
    check_is_run(out)
    method = read_method(joined(out, CONFIG))
    rows = read_metrics(out)
    done = storage.size(f"{BUNDLE}/generator.json") is not None
    names = list(dict.fromkeys(row["stage"] for row in rows))
    finished = [name for name in names if storage.exists(f"{STAGES}/{name}")]
    starts = [event for event in read_workers(out) if isinstance(event, Start)]
    checkpoint = _newest_checkpoint(storage)
    status = RunStatus(
        out=str(out), method=method, done=done, finished=finished, scalars={}, starts=starts, checkpoint=checkpoint
    )
    return _with_newest(status, rows) if rows else status


def _with_newest(status: RunStatus, rows: list[Row]) -> RunStatus:
    newest = rows[-1]
    num_steps = {stage.name: stage.num_steps for stage in read_stages(status.out)}
    written = Storage.at(status.out).modified(METRICS)
    recent = [row for row in rows if row["stage"] == newest["stage"]][-_ROWS_FOR_RATE:]
    seconds = newest["time"] - recent[0]["time"]
    beside = ("stage", "step", "time", "learning_rate", PERF)
    scalars = {name: value for name, value in newest.items() if name not in beside}
    return replace(
        status,
        stage=newest["stage"],
        step=newest["step"] + 1,
        num_steps=num_steps.get(newest["stage"], 0),
        scalars=dict(list(scalars.items())[:_SHOWN]),
        perf=newest.get(PERF, {}),
        steps_per_second=(newest["step"] - recent[0]["step"]) / seconds if seconds > 0 else None,
        seconds_since_row=None if written is None else max(0.0, time.time() - written),
    )


def _newest_checkpoint(storage: Storage) -> str:
    position = newest_position(storage)
    if position is None:
        return ""
    names = [stage.name for stage in read_stages(storage.name)]
    stage = f"stage '{names[position[0]]}'" if position[0] < len(names) else "the end"
    return f"step {position[1]} of {stage}"


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count > 1)}" if count else "one process without workers"


def _since(start: Start, done: bool) -> str:
    return "" if done else f", since {_clock(start)}"


def _clock(start: Start) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.time))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
