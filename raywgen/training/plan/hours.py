"""The time of a run, and its price, from the time of its steps."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from raywgen.config import ConfigError, save_config
from raywgen.generators.bundle import load_bundle
from raywgen.generators.settings import StageConfig
from raywgen.training.config import TrainConfig
from raywgen.training.plan.config import PlanConfig
from raywgen.training.plan.nodes import PlannedNodes
from raywgen.training.plan.shapes import GeneratorShape
from raywgen.training.plan.tokens import values_per_second
from raywgen.training.run_folder import BUNDLE
from raywgen.training.runlog import Row, read_metrics
from raywgen.trust import trusted

_NEVER = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """The seconds of what takes time in a stage.

    Attributes:
        step: Seconds of a step.
        save: Seconds by which a checkpoint delays steps.
        setup: Seconds until its first step has ended, without the step.
        validation: Seconds of a validation.
    """

    step: float
    save: float = 0.0
    setup: float = 0.0
    validation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Hours:
    """The time of a run.

    Attributes:
        seconds: What takes time in each stage.
        hours: Hours in all.
        node_hours: Hours of all nodes that workers take.
        price: Price of these; 0 without one.
        is_measured: Whether the seconds were measured here.
        values_per_second: Values of a network that the generator writes in a second here; None where not measured.
    """

    seconds: dict[str, StageSeconds]
    hours: float
    node_hours: float
    price: float
    is_measured: bool
    values_per_second: float | None = None


def planned_hours(
    config: TrainConfig, plan: PlanConfig, generator: GeneratorShape, nodes: PlannedNodes
) -> Hours | None:
    """Returns the time of a run from steps that are given or measured; None where neither is.

    Raises:
        ConfigError: A stage has no time of its step, or the measurement failed.
    """
    rate = None
    if plan.measure:
        seconds, rate = measured_rates(config, plan.measured_steps)
    elif plan.seconds_per_step is not None:
        seconds = _given_seconds(plan.seconds_per_step, [stage.name for stage in generator.stages])
    else:
        return None
    hours = run_seconds(config, seconds) / 3600
    node_hours = hours * nodes.num_used(config.device, config.max_workers)
    return Hours(
        seconds=seconds,
        hours=hours,
        node_hours=node_hours,
        price=node_hours * plan.price_per_node_hour,
        is_measured=plan.measure,
        values_per_second=rate,
    )


def _given_seconds(given: Any, names: Sequence[str]) -> dict[str, StageSeconds]:
    of_stage: dict[str, Any] = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    if missing := [name for name in names if name not in of_stage]:
        raise ConfigError(f"seconds_per_step: give those of stage '{missing[0]}' too")
    return {name: StageSeconds(step=float(of_stage[name])) for name in names}


def run_seconds(config: TrainConfig, seconds: Mapping[str, StageSeconds]) -> float:
    """Returns the seconds of all steps of a run, with preparation and validations."""
    total = 0.0
    for name, each in seconds.items():
        num_steps = getattr(config.generator, name).num_steps
        num_validations = 1 + -(-num_steps // config.validate_every)
        num_saves = (num_steps - 1) // config.save_every
        total += each.setup + num_steps * each.step + num_validations * each.validation + num_saves * each.save
    return total


def stage_seconds(rows: Sequence[Row], clock: str = "time") -> dict[str, StageSeconds]:
    """Returns what the rows of a `short_run` say.

    Args:
        rows: The rows of its metric log.
        clock: The column of the rows that holds seconds since its beginning.
    """
    found: dict[str, StageSeconds] = {}
    before = 0.0
    for name in dict.fromkeys(row["stage"] for row in rows):
        times = [row[clock] for row in rows if row["stage"] == name]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        saved = len(times) // 2 - 1
        step = median([gap for place, gap in enumerate(gaps[:-1]) if place not in (0, saved)])
        validation = max(0.0, gaps[-1] - step)
        setup = max(0.0, times[0] - before - step - validation)
        save = max(0.0, gaps[saved] - step)
        found[name] = StageSeconds(step=step, save=save, setup=setup, validation=validation)
        before = times[-1]
    return found


def short_run(config: TrainConfig, num_steps: int, out: str) -> TrainConfig:
    """Returns a run of a few steps of each stage.

    It logs every step, validates after the first and the last, and saves after half of them.
    """
    generator = replace(
        config.generator,
        **{
            name: replace(stage, num_steps=num_steps)
            for name, stage in vars(config.generator).items()
            if isinstance(stage, StageConfig) and stage.num_steps
        },
    )
    return replace(
        config, generator=generator, out=out, log_every=1, validate_every=_NEVER, checkpoint_every=2 * (num_steps // 2)
    )


def measured_rates(config: TrainConfig, num_steps: int) -> tuple[dict[str, StageSeconds], float]:
    """Runs some steps of each stage in a process of its own, then writes a part of a network of the largest layout.

    Returns:
        What the steps took, and the values that were written in a second.

    Raises:
        ConfigError: The run failed; the message holds its reason.
    """
    with tempfile.TemporaryDirectory(prefix="raywgen-plan-") as folder:
        path = Path(folder) / "run.yaml"
        out = str(Path(folder) / "out")
        save_config(short_run(config, num_steps, out), path)
        names = [argument for name in trusted() for argument in ("--trust", name)]
        command = [sys.executable, "-m", "raywgen", "train", str(path), *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.strip().splitlines() if line.startswith("error:")]
            reason = (lines or done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(f"measure=true: a few steps of the run failed: {reason.removeprefix('error: ')}")
        generator = load_bundle(Path(out) / BUNDLE)
        layout = max(generator.layouts, key=lambda each: each.num_values)
        return stage_seconds(read_metrics(out)), values_per_second(generator, layout, generator.data)
