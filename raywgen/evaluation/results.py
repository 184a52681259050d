"""The results of an evaluation, as `evaluation.json` holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from raywgen.evaluation.tokenizer_facts import TokenizerReport

EVALUATION = "evaluation.json"
SCHEMA_VERSION = 3
GROUPS = ("ladder", "baseline", "finetuned", "ablation")
"""Groups of rows in reading order. Baselines have the budget of generated networks: as many candidates, and no more
labelled samples; networks of `finetuned` are trained on all images of the task."""
SPLITS = ("unseen", "seen")
"""Splits in the order of the report: unseen tasks, which alone show that a generator has learned something, first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to obtain a network; `group` is one of `GROUPS`."""

    name: str
    group: str
    label: str
    help: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Mean accuracy in [0, 1] of one row on one split and layout, with half its 95 % confidence interval."""

    split: str
    layout: str
    row: str
    accuracy: float
    ci95: float
    num_networks: int

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Takes one entry of the file's list.

        Raises:
            KeyError, ValueError: A part is missing or out of its range.
        """
        return cls(
            split=content["split"],
            layout=content["layout"],
            row=content["row"],
            accuracy=_share(content, "accuracy"),
            ci95=_positive(content, "ci95"),
            num_networks=int(content["num_networks"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoveltyRow:
    """One network beside the stored network nearest to it.

    Attributes:
        kind: Name of the row that the network belongs to.
        split: Split of its task.
        layout: Name of its architecture.
        task: Id of its task.
        weight_distance: Root mean square difference in weights, in standard deviations of each tensor over the corpus.
        error_overlap: Errors of both networks over errors of either.
        accuracy: Balanced test accuracy in [0, 1].
    """

    kind: str
    split: str
    layout: str
    task: str
    weight_distance: float
    error_overlap: float
    accuracy: float

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Takes one entry of the file's list.

        Raises:
            KeyError, ValueError: A part is missing or out of its range.
        """
        return cls(
            kind=content["kind"],
            split=content["split"],
            layout=content["layout"],
            task=content["task"],
            weight_distance=_positive(content, "weight_distance"),
            error_overlap=_share(content, "error_overlap"),
            accuracy=_share(content, "accuracy"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Novelty:
    """The distance of networks to those the generator was trained on.

    Attributes:
        rows: One a network.
        reference_distance: Median weight distance of networks that were trained on the tasks and held out; 0 if none.
        verdict: `replica`, `interpolation`, `novel` or `unjudged`.
        verdict_text: The verdict in a sentence.
    """

    rows: tuple[NoveltyRow, ...]
    reference_distance: float
    verdict: str
    verdict_text: str

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Takes the file's part.

        Raises:
            KeyError, ValueError: A part is missing or out of its range.
        """
        return cls(
            rows=tuple(NoveltyRow.from_json(row) for row in content["rows"]),
            reference_distance=_positive(content, "reference_distance"),
            verdict=content["verdict"],
            verdict_text=content["verdict_text"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """The number of uses of each code of each level."""

    codes: int
    usage: tuple[tuple[float, ...], ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Takes the file's part.

        Raises:
            KeyError, ValueError: A part is missing, or the counts are not one a code.
        """
        codes = int(content["codes"])
        usage = tuple(tuple(float(count) for count in level) for level in content["usage"])
        if any(len(level) != codes for level in usage):
            raise ValueError(f"the codebook's usage does not count each of its {codes} codes")
        return cls(codes=codes, usage=usage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A statement that the evaluation checked."""

    text: str
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The content of `evaluation.json`; None or empty where an optional part is absent.

    Attributes:
        layouts: Names of the architectures.
        rows: The rows of the ladder, in reading order.
        ladder: The accuracy of each row on each split and layout.
        novelty: Distance to the stored networks.
        codebook: Use of the tokeniser's codes.
        tokenizer: Bits, distortion and accuracy of the tokeniser.
        claims: The statements that were checked.
        figures: Mean accuracies in percent and other headline numbers, by name.
        paths: Places of what a run wrote, by name.
        num_test_images: Test samples of a task.
        best_of: Candidates that each network was chosen from.
        num_samples: Labelled samples of a condition.
        minutes: Duration of the whole run.
    """

    layouts: tuple[str, ...]
    rows: tuple[Row, ...]
    ladder: tuple[Cell, ...]
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

    def __repr__(self) -> str:
        named = ("seen_generated", "unseen_generated", "unseen_nearest", "unseen_average")
        shown = [f"{name} {self.figures[name]:.1f}" for name in named if name in self.figures]
        shown += [] if self.novelty is None else [f"verdict {self.novelty.verdict}"]
        return f"Evaluation({', '.join([*self.layouts[:3], *shown])}, {len(self.figures)} figures)"

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file."""
        return {"schema_version": SCHEMA_VERSION} | asdict(self)

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
            rows=tuple(Row(**row) for row in content["rows"]),
            ladder=tuple(Cell.from_json(cell) for cell in content["ladder"]),
            novelty=Novelty.from_json(content["novelty"]) if content.get("novelty") else None,
            codebook=Codebook.from_json(content["codebook"]) if content.get("codebook") else None,
            tokenizer=TokenizerReport.from_json(content["tokenizer"]) if content.get("tokenizer") else None,
            claims=tuple(Claim(text=row["text"], holds=bool(row["holds"])) for row in content.get("claims") or ()),
            figures={name: float(number) for name, number in (content.get("figures") or {}).items()},
            paths={name: str(path) for name, path in (content.get("paths") or {}).items()},
            **{name: content.get(name) for name in ("num_test_images", "best_of", "num_samples", "minutes")},
        )
        evaluation._check_names()
        return evaluation

    def _check_names(self) -> None:
        novelty: Sequence[NoveltyRow] = self.novelty.rows if self.novelty else ()
        known = {
            "group": (GROUPS, [row.group for row in self.rows]),
            "row": (
                [row.name for row in self.rows],
                [*(cell.row for cell in self.ladder), *(row.kind for row in novelty)],
            ),
            "layout": (self.layouts, [entry.layout for entry in (*self.ladder, *novelty)]),
            "split": (SPLITS, [entry.split for entry in (*self.ladder, *novelty)]),
        }
        for what, (allowed, used) in known.items():
            if unknown := sorted(set(used) - set(allowed)):
                raise ValueError(f"{what} '{unknown[0]}' is not one of {', '.join(allowed)}")


def is_finite_number(value: Any) -> bool:
    """Whether a value read from a file is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(content: Mapping[str, Any], name: str, accept: Callable[[float], bool], allowed: str) -> float:
    value = content[name]
    if not is_finite_number(value) or not accept(value):
        raise ValueError(f"{name} is {value!r}, not {allowed}")
    return float(value)


def _share(content: Mapping[str, Any], name: str) -> float:
    return _number(content, name, lambda value: 0 <= value <= 1, "a share between 0 and 1")


def _positive(content: Mapping[str, Any], name: str) -> float:
    return _number(content, name, lambda value: value >= 0, "a number of at least 0")
