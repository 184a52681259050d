from __future__ import annotations

import pytest
import torch

from raywgen.corpus import Corpus
from raywgen.evaluation.novelty import error_overlap, median_distance, nearness, points, verdict
from raywgen.evaluation.task_evaluator import TaskEvaluator, make_evaluator
from raywgen.training.data import measure_normalizers


@pytest.fixture(scope="module")
def bench(zoo_corpus: Corpus) -> TaskEvaluator:
    layout_id, (_, normalizer) = next(iter(measure_normalizers(zoo_corpus).items()))
    made = make_evaluator(zoo_corpus, layout_id, "unseen", normalizer, num_tasks=4)
    assert made is not None
    return made


def test_error_overlap_is_intersection_over_union() -> None:
    wrong = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    other = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    assert error_overlap(wrong, other).tolist() == pytest.approx([1 / 3, 0.0, 1.0])


def test_a_copy_has_no_distance_and_full_overlap(bench: TaskEvaluator) -> None:
    copies_TD = bench.stored.values_RD[: len(bench.tasks)]
    near = nearness(bench, copies_TD)
    # cdist by inner products leaves an error of about the square root of float32 resolution.
    assert float(near.distance_T.max()) < 1e-2
    assert near.overlap_T.tolist() == pytest.approx([1.0] * len(bench.tasks))


def test_distance_is_the_root_mean_square_in_units_of_scale(bench: TaskEvaluator) -> None:
    values_TD = bench.originals_TD
    near = nearness(bench, values_TD)
    scale, stored = bench.normalizer.scale_D.double(), bench.stored.values_RD.double()
    for index, value_D in enumerate(values_TD.double()):
        every = ((value_D - stored) / scale).square().mean(dim=1).sqrt()
        assert float(near.distance_T[index]) == pytest.approx(float(every.min()), rel=1e-4)


def test_points_name_task_and_kind(bench: TaskEvaluator) -> None:
    rows = points(bench, "original", bench.originals_TD, bench.accuracy(bench.originals_TD))
    assert [row["task"] for row in rows] == [task.id for task in bench.tasks]
    assert {row["kind"] for row in rows} == {"original"}
    assert median_distance(rows, "original") > 0
    assert median_distance(rows, "generated") == 0


def test_the_distance_is_the_median_over_networks_of_one_kind_on_unseen_tasks() -> None:
    told = [("generated", "unseen", value) for value in (0.1, 0.2, 9.0)]
    told += [("original", "unseen", value) for value in (1.0, 2.0, 90.0)]
    told += [("generated", "seen", value) for value in (5.0, 6.0, 7.0)]
    rows = [{"kind": kind, "split": split, "weight_distance": value} for kind, split, value in told]
    assert median_distance(rows, "generated") == pytest.approx(0.2)
    assert median_distance(rows, "original") == pytest.approx(2.0)
    seen = [row for row in rows if row["split"] == "seen"]
    assert median_distance(seen, "generated") == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("distance", "accuracy", "word"),
    [
        (0.05, 99.0, "replica"),
        (0.09, 99.0, "replica"),
        (0.9, 95.0, "novel"),
        (0.9, 80.0, "interpolation"),
        (0.3, 95.0, "interpolation"),
    ],
)
def test_verdict(distance: float, accuracy: float, word: str) -> None:
    rows = [
        {"kind": kind, "split": "unseen", "weight_distance": value}
        for kind, value in (("generated", distance), ("original", 1.0))
    ]
    rivals = {"unseen_nearest": 85.0, "unseen_average": 50.0, "unseen_noise": 84.0, "unseen_gaussian": 60.0}
    found, sentence = verdict(rows, {**rivals, "unseen_generated": accuracy})
    assert found == word
    assert f"{abs(accuracy - 85.0):.1f} points" in sentence


@pytest.mark.parametrize(("distance", "word"), [(0.05, "replica"), (0.9, "unjudged")])
def test_without_held_out_networks_only_copies_are_judged(distance: float, word: str) -> None:
    rows = [{"kind": "generated", "split": "seen", "weight_distance": distance}]
    figures = {f"seen_{name}": 50.0 for name in ("generated", "nearest", "average", "noise", "gaussian")}
    found, sentence = verdict(rows, figures)
    assert found == word
    assert f"{distance:.2f} standard deviations" in sentence
