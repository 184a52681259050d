"""The one sentence that an evaluation comes to, and the figures that it rests on.

Figures are rounded as they are shown before they are compared, so that no difference disagrees with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from raywgen.evaluation.results import SPLITS, Cell, Evaluation, Row

_PERCENT = 100.0
_LEVEL = "level with"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A mean over layouts and half its 95 % interval as they are shown: in percent, to one decimal."""

    accuracy: float
    interval: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The finding of an evaluation.

    Attributes:
        label: The finding in a few words.
        sentence: The finding with its figures.
        split: The split of tasks that it is about.
        is_good: Whether the networks are neither copies nor below a baseline.
        generated: Accuracy of the generated networks.
        baseline: The most accurate baseline and its accuracy; None where none was measured.
        original: Accuracy of networks that were trained on the tasks; None where it was not measured.
    """

    label: str
    sentence: str
    split: str
    is_good: bool
    generated: Figure
    baseline: tuple[Row, Figure] | None
    original: Figure | None


def headline(evaluation: Evaluation) -> Headline | None:
    """Returns what an evaluation says of unseen tasks, or where there are none of seen ones.

    Copies are called copies, however accurate they are. Anything else is held against the most accurate baseline. Rows
    that are fine-tuned on all images of a task are none: generated networks have seen only a few of them.
    """
    split = next((name for name in SPLITS if cells_of(evaluation, name, "generated")), None)
    generated = figure(cells_of(evaluation, split, "generated")) if split else None
    if split is None or generated is None:
        return None
    baseline = best_baseline(evaluation, split)
    label, sentence, is_good = _against(generated, baseline)
    sentence = f"On {split} tasks, generated networks score {generated.accuracy:.1f} %{sentence}."
    if evaluation.novelty is not None and evaluation.novelty.verdict == "replica":
        label, sentence, is_good = "Copies of stored networks", evaluation.novelty.verdict_text, False
    return Headline(
        label=label,
        sentence=sentence,
        split=split,
        is_good=is_good,
        generated=generated,
        baseline=baseline,
        original=figure(cells_of(evaluation, split, "original")),
    )


def _against(generated: Figure, baseline: tuple[Row, Figure] | None) -> tuple[str, str, bool]:
    """Returns the finding in words, the rest of its sentence, and whether it is good."""
    if baseline is None:
        return "No baseline was measured", "; no baseline was measured", False
    row, other = baseline
    stands = compare(generated, other)
    intervals = ", within their 95 % intervals" if stands == _LEVEL else ""
    sentence = f", {stands} the best baseline ({lower(row.label)}, {other.accuracy:.1f} %){intervals}"
    if stands == _LEVEL:
        return "Level with the best baseline", sentence, True
    is_above = generated.accuracy > other.accuracy
    return "Better than every baseline" if is_above else "Below the best baseline", sentence, is_above


def cells_of(evaluation: Evaluation, split: str, row: str) -> list[Cell]:
    """Returns the cells of a row on a split, one per layout, in the order of the layouts."""
    chosen = [cell for cell in evaluation.ladder if (cell.split, cell.row) == (split, row)]
    return sorted(chosen, key=lambda cell: evaluation.layouts.index(cell.layout))


def figure(cells: Sequence[Cell]) -> Figure | None:
    """Returns the mean of cells over layouts; None where there are none.

    The layouts are measured on the same tasks, so their errors may be correlated. The mean of their intervals holds
    however strong the correlation is.
    """
    if not cells:
        return None
    return Figure(
        accuracy=round(_PERCENT * fmean(cell.accuracy for cell in cells), 1),
        interval=round(_PERCENT * fmean(cell.ci95 for cell in cells), 1),
    )


def best_baseline(evaluation: Evaluation, split: str) -> tuple[Row, Figure] | None:
    """Returns the most accurate baseline on a split, the first of equals, and its accuracy."""
    found = [
        (row, mean)
        for row in evaluation.rows
        if row.group == "baseline" and (mean := figure(cells_of(evaluation, split, row.name)))
    ]
    return max(found, key=lambda pair: pair[1].accuracy, default=None)


def compare(one: Figure, other: Figure) -> str:
    """Says in words how one figure stands to another; a difference inside the joint interval is none."""
    difference = round(one.accuracy - other.accuracy, 1)
    if abs(difference) <= math.hypot(one.interval, other.interval):
        return _LEVEL
    return f"{abs(difference):.1f} percentage points {'above' if difference > 0 else 'below'}"


def lower(label: str) -> str:
    """Returns a label as it stands inside a sentence; names in capitals stay."""
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]
