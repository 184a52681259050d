"""The sentence that an evaluation comes to, and the differences in it against the figures beside them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raywgen.evaluation.claims import checked_claims
from raywgen.evaluation.headline import Figure, compare, headline
from raywgen.evaluation.results import Cell, Evaluation, Novelty, Row

SHARE = st.floats(0.3, 0.99)


def evaluation_of(accuracies: dict[str, tuple[str, float, float]]) -> Evaluation:
    """An evaluation of one layout on unseen tasks: row -> its group, accuracy and interval."""
    return Evaluation(
        layouts=("net",),
        rows=tuple(Row(name=name, group=group, label=name.title()) for name, (group, _, _) in accuracies.items()),
        ladder=tuple(
            Cell(split="unseen", layout="net", row=name, accuracy=accuracy, ci95=interval, num_networks=4)
            for name, (_, accuracy, interval) in accuracies.items()
        ),
    )


@given(SHARE, SHARE, st.floats(0, 0.01))
def test_a_difference_is_that_of_the_figures_beside_it(generated: float, other: float, interval: float) -> None:
    found = headline(
        evaluation_of({"generated": ("ladder", generated, interval), "gradient": ("baseline", other, interval)})
    )
    assert found is not None
    figures = [float(number) for number in re.findall(r"(\d+\.\d) %", found.sentence.partition(", within")[0])]
    assert found.baseline is not None
    assert figures == [found.generated.accuracy, found.baseline[1].accuracy]
    if difference := re.search(r"([\d.]+) percentage points", found.sentence):
        assert float(difference[1]) == round(abs(figures[0] - figures[1]), 1)
    assert ("Better" in found.label) == (" above " in found.sentence)
    assert ("Below" in found.label) == (" below " in found.sentence)


def test_rows_that_saw_all_images_are_no_baseline() -> None:
    rows = {"generated": ("ladder", 0.9, 0.0), "gradient": ("baseline", 0.8, 0.0), "tuned": ("finetuned", 0.99, 0.0)}
    found = headline(evaluation_of(rows))
    assert found is not None
    assert found.label == "Better than every baseline"
    assert "10.0 percentage points above the best baseline (gradient, 80.0 %)" in found.sentence


def test_copies_are_called_copies_however_accurate() -> None:
    rows = {"generated": ("ladder", 0.9, 0.0), "gradient": ("baseline", 0.8, 0.0)}
    novelty = Novelty(rows=(), reference_distance=1.0, verdict="replica", verdict_text="They lie at 0.01.")
    found = headline(replace(evaluation_of(rows), novelty=novelty))
    assert found is not None
    assert (found.label, found.sentence, found.is_good) == ("Copies of stored networks", "They lie at 0.01.", False)


@pytest.mark.parametrize(("interval", "stands"), [(0.5, "1.0 percentage points below"), (0.8, "level with")])
def test_a_difference_inside_the_joint_interval_is_none(interval: float, stands: str) -> None:
    assert compare(Figure(accuracy=89.0, interval=interval), Figure(accuracy=90.0, interval=interval)) == stands


def test_claims_are_sentences_that_hold_for_the_figures_in_them() -> None:
    figures = {"unseen_generated": 90.04, "unseen_nearest": 89.96, "unseen_original": 95.0, "seen_original": 96.0}
    figures |= {"unseen_average": 50.0, "seen_reconstructed": 94.96, "seen_generated": 91.2}
    claims = {claim.text: claim.holds for claim in checked_claims(figures)}
    assert claims == {
        "On seen tasks, networks that went through the generator's code and back lose at most one percentage point "
        "(95.0 against 96.0 %).": True,
        "On seen tasks, generated networks keep at least 95 % of the accuracy of networks that were trained on them "
        "(91.2 against 96.0 %).": True,
        "On unseen tasks, generated networks score above the nearest stored networks (90.0 against 90.0 %).": False,
        "On unseen tasks, generated networks score above the average of all stored networks "
        "(90.0 against 50.0 %).": True,
        "On unseen tasks, generated networks keep at least 90 % of the accuracy of networks that were trained on them "
        "(90.0 against 95.0 %).": True,
    }
