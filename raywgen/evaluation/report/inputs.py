"""Reads and checks the files that pages are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from raywgen.evaluation.results import Evaluation, is_finite_number
from raywgen.evaluation.tokenizer_facts import TokenizerReport
from raywgen.inputs import MAX_JSON_BYTES, parse_json, read_json, read_regular

ContentT = TypeVar("ContentT")

_REMEDY = "run `raywgen {}` again"


class ReportError(ValueError):
    """A run folder that no report can be written for; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLog:
    """The scalars of one stage of one run, each as (step, value) pairs in step order.

    Attributes:
        run: The run's folder.
        stage: The stage's name.
        scalars: Each scalar by its name.
        last_step: The last step that was logged, counted from 0.
        seconds: When that was, in seconds since the run began.
    """

    run: str
    stage: str
    scalars: Mapping[str, tuple[tuple[float, float], ...]]
    last_step: float
    seconds: float


def read_evaluation(path: Path) -> Evaluation:
    """Reads and checks `evaluation.json`.

    Raises:
        ReportError: It is damaged.
    """
    return read_as(path, Evaluation.from_json, "evaluate")


def read_tokenizer(path: Path) -> TokenizerReport:
    """Reads and checks `tokenizer.json`.

    Raises:
        ReportError: It is damaged.
    """
    return read_as(path, TokenizerReport.from_json, "train")


def read_as(path: Path, make: Callable[[Any], ContentT], command: str) -> ContentT:
    """Reads a file of JSON and makes of its content what the page shows.

    Raises:
        ReportError: The content is not what the command writes, which is the remedy.
    """
    remedy = _REMEDY.format(command)
    try:
        return make(read_json(path))
    except KeyError as error:
        raise ReportError(f"{path} is damaged: it lacks {error}; {remedy}") from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ReportError(f"{path} is damaged: {error}; {remedy}") from error


def read_metrics(path: Path, run: str) -> tuple[list[StageLog], int]:
    """Reads a `metrics.jsonl`, stage by stage in order of appearance, and counts the lines that cannot be read.

    Where a run was resumed and a step logged twice, the later line counts.

    Raises:
        OSError: It is no regular file, too long, or cannot be read.
    """
    stages: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    ends: dict[str, tuple[float, float]] = {}
    num_unreadable = 0
    for line in read_regular(path, MAX_JSON_BYTES).decode(errors="replace").splitlines():
        try:
            row = parse_json(line)
            step, stage = float(row["step"]), str(row.get("stage", "training"))
        except (ValueError, KeyError, TypeError, AttributeError):
            num_unreadable += bool(line.strip())
            continue
        for name, value in row.items():
            if name not in ("step", "time") and is_finite_number(value):
                stages[stage][name][step] = float(value)
        seconds = float(row["time"]) if is_finite_number(row.get("time")) else 0.0
        ends[stage] = max(ends.get(stage, (0.0, 0.0)), (step, seconds))
    logs = [
        StageLog(
            run=run,
            stage=stage,
            scalars={name: tuple(sorted(values.items())) for name, values in scalars.items()},
            last_step=ends[stage][0],
            seconds=ends[stage][1],
        )
        for stage, scalars in stages.items()
    ]
    return logs, num_unreadable
