"""What a report is made of: the evaluation's results and the metric logs of a run folder, read and checked."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from raywgen.evaluation.tokenizer_facts import TokenizerReport
from raywgen.inputs import MAX_JSON_BYTES, parse_json, read_json, read_regular

SCHEMA_VERSION = 1
GROUPS = ("ladder", "baseline", "ablation")
SPLITS = ("unseen", "seen")
"""In the order of the report: what shows that a generator has learned something comes first."""
_REMEDY = "run `raywgen evaluate` again"


class ReportError(ValueError):
    """A run folder that no report can be written for; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One way to come by a network; `group` is one of `GROUPS`."""

    name: str
    group: str
    label: str
    help: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Mean accuracy in [0, 1] of one rung on one split and layout, with half its 95 % confidence interval."""

    split: str
    layout: str
    rung: str
    accuracy: float
    ci95: float
    num_networks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NoveltyPoint:
    """One network against the stored network nearest to it; `kind` is the name of a rung.

    `error_overlap` is the errors of both over the errors of either.
    """

    kind: str
    split: str
    weight_distance: float
    error_overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Novelty:
    """How far networks are from those the generator was trained on."""

    points: tuple[NoveltyPoint, ...]
    reference_distance: float
    verdict: str
    verdict_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """How often each code of each level was used."""

    codes: int
    usage: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A statement that the evaluation checked."""

    text: str
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The content of `evaluation.json`; None or empty where an optional part is absent."""

    layouts: tuple[str, ...]
    rungs: tuple[Rung, ...]
    cells: tuple[Cell, ...]
    novelty: Novelty | None = None
    codebook: Codebook | None = None
    tokenizer: TokenizerReport | None = None
    claims: tuple[Claim, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    num_test_images: int | None = None
    best_of: int | None = None
    num_samples: int | None = None
    minutes: float | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Takes the parsed file.

        Raises:
            KeyError, TypeError, ValueError: A part is missing, of the wrong type, or contradicts another.
        """
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {content['schema_version']!r}, not {SCHEMA_VERSION}")
        evaluation = cls(
            layouts=tuple(content["layouts"]),
            rungs=tuple(Rung(**row) for row in content["rungs"]),
            cells=tuple(_cell(row) for row in content["ladder"]),
            novelty=_novelty(content["novelty"]) if content.get("novelty") else None,
            codebook=_codebook(content["codebook"]) if content.get("codebook") else None,
            tokenizer=TokenizerReport.from_json(content["tokenizer"]) if content.get("tokenizer") else None,
            claims=tuple(Claim(text=row["text"], holds=bool(row["holds"])) for row in content.get("claims") or ()),
            figures={name: float(number) for name, number in (content.get("figures") or {}).items()},
            paths={name: str(path) for name, path in (content.get("paths") or {}).items()},
            **{name: content.get(name) for name in ("num_test_images", "best_of", "num_samples", "minutes")},
        )
        evaluation._check_names()
        return evaluation

    def _check_names(self) -> None:
        points = self.novelty.points if self.novelty else ()
        known = {
            "group": (GROUPS, [rung.group for rung in self.rungs]),
            "rung": (
                [rung.name for rung in self.rungs],
                [*(cell.rung for cell in self.cells), *(point.kind for point in points)],
            ),
            "layout": (self.layouts, [cell.layout for cell in self.cells]),
            "split": (SPLITS, [row.split for row in (*self.cells, *points)]),
        }
        for what, (allowed, used) in known.items():
            if unknown := sorted(set(used) - set(allowed)):
                raise ValueError(f"{what} '{unknown[0]}' is not one of {', '.join(allowed)}")


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
            if name not in ("step", "time") and _is_finite_number(value):
                stages[stage][name][step] = float(value)
    logs = [
        StageLog(
            run=run, stage=stage, scalars={name: tuple(sorted(values.items())) for name, values in scalars.items()}
        )
        for stage, scalars in stages.items()
    ]
    return logs, num_unreadable


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(row: Mapping[str, Any], name: str, accept: Callable[[float], bool], allowed: str) -> float:
    value = row[name]
    if not _is_finite_number(value) or not accept(value):
        raise ValueError(f"{name} is {value!r}, not {allowed}")
    return float(value)


def _cell(row: Mapping[str, Any]) -> Cell:
    return Cell(
        split=row["split"],
        layout=row["layout"],
        rung=row["rung"],
        accuracy=_number(row, "accuracy", lambda value: 0 <= value <= 1, "a share between 0 and 1"),
        ci95=_number(row, "ci95", lambda value: value >= 0, "a number of at least 0"),
        num_networks=int(row["num_networks"]),
    )


def _novelty(content: Mapping[str, Any]) -> Novelty:
    return Novelty(
        points=tuple(
            NoveltyPoint(
                kind=row["kind"],
                split=row["split"],
                weight_distance=_number(row, "weight_distance", lambda value: value >= 0, "a number of at least 0"),
                error_overlap=_number(row, "error_overlap", lambda value: 0 <= value <= 1, "a share between 0 and 1"),
            )
            for row in content["points"]
        ),
        reference_distance=_number(content, "reference_distance", lambda value: value >= 0, "a number of at least 0"),
        verdict=content["verdict"],
        verdict_text=content["verdict_text"],
    )


def _codebook(content: Mapping[str, Any]) -> Codebook:
    codes = int(content["codes"])
    usage = tuple(tuple(float(count) for count in level) for level in content["usage"])
    if any(len(level) != codes for level in usage):
        raise ValueError(f"the codebook's usage does not count each of its {codes} codes")
    return Codebook(codes=codes, usage=usage)
