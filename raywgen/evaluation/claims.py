"""Checks in sentences what an evaluation is expected to show, on the figures as they are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from raywgen.evaluation.results import Claim

Holds = Callable[[float, float], bool]


def _above(one: float, other: float) -> bool:
    return one > other


def _loses_at_most_one_point(one: float, other: float) -> bool:
    return round(other - one, 1) <= 1.0


_GENERATED = "generated networks"
_CLAIMS: list[tuple[str, str, str, str, Holds]] = [
    (
        "seen",
        "reconstructed",
        "original",
        "networks that went through the generator's code and back lose at most one percentage point",
        _loses_at_most_one_point,
    ),
    (
        "seen",
        "generated",
        "original",
        f"{_GENERATED} keep at least 95 % of the accuracy of networks that were trained on them",
        lambda one, other: one >= 0.95 * other,
    ),
    ("unseen", "generated", "nearest", f"{_GENERATED} score above the nearest stored networks", _above),
    ("unseen", "generated", "average", f"{_GENERATED} score above the average of all stored networks", _above),
    ("unseen", "generated", "gaussian", f"{_GENERATED} score above draws of the stored networks' Gaussian", _above),
    ("unseen", "generated", "gradient", f"{_GENERATED} score above the shared start fitted to the same data", _above),
    ("unseen", "generated", "shuffled", f"{_GENERATED} score above those told another task", _above),
    (
        "unseen",
        "generated",
        "original",
        f"{_GENERATED} keep at least 90 % of the accuracy of networks that were trained on them",
        lambda one, other: one >= 0.9 * other,
    ),
]
"""Split of tasks, row, the row it is held against, the rest of the sentence, and when it holds, in percent."""


def checked_claims(figures: Mapping[str, float]) -> tuple[Claim, ...]:
    """Checks what the demo sets out to show; a claim about a figure that was not measured is left out.

    Args:
        figures: Mean accuracies in percent by split and row, as `Evaluation.figures` holds them.
    """
    checked = []
    for split, row, other, sentence, holds in _CLAIMS:
        if f"{split}_{row}" in figures and f"{split}_{other}" in figures:
            left, right = (round(figures[f"{split}_{name}"], 1) for name in (row, other))
            text = f"On {split} tasks, {sentence} ({left:.1f} against {right:.1f} %)."
            checked.append(Claim(text=text, holds=holds(left, right)))
    return tuple(checked)
