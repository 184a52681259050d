"""Reads and checks the files that a report is made of: the evaluation's results and the metric logs of a run folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raywgen.evaluation.results import Evaluation, is_finite_number
from raywgen.inputs import MAX_JSON_BYTES, parse_json, read_json, read_regular

_REMEDY = "run `raywgen evaluate` again"


class ReportError(ValueError):
    """A run folder that no report can be written for; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLog:
    """The scalars of one stage of one run, each as (step, value) pairs in step order."""

    run: str
    stage: str
    scalars: Mapping[str, tuple[tuple[float, float], ...]]


def read_evaluation(path: Path) -> Evaluation:
    """Reads and checks `evaluation.json`.

    Raises:
        ReportError: It is missing or damaged.
    """
    if not path.is_file():
        raise ReportError(f"{path} does not exist, so there is nothing to report; run `raywgen evaluate` first")
    try:
        return Evaluation.from_json(read_json(path))
    except KeyError as error:
        raise ReportError(f"{path} is damaged: it lacks {error}; {_REMEDY}") from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ReportError(f"{path} is damaged: {error}; {_REMEDY}") from error


def read_metrics(path: Path, run: str) -> tuple[list[StageLog], int]:
    """Reads a `metrics.jsonl`, stage by stage in order of appearance, and counts the lines that cannot be read.

    Where a run was resumed and a step logged twice, the later line counts.

    Raises:
        OSError: It is no regular file, too long, or cannot be read.
    """
    stages: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
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
    logs = [
        StageLog(
            run=run, stage=stage, scalars={name: tuple(sorted(values.items())) for name, values in scalars.items()}
        )
        for stage, scalars in stages.items()
    ]
    return logs, num_unreadable
