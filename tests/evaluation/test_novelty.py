from __future__ import annotations

import pytest
import torch

from raywgen.corpus import Corpus
from raywgen.evaluation.novelty import (
    distances,
    error_overlap,
    median_distance,
    nearest_stored,
    nearness,
    novelty_rows,
    verdict,
)
from raywgen.evaluation.results import NoveltyRow
from raywgen.evaluation.task_evaluator import TaskEvaluator, make_evaluator
from raywgen.training.data import measure_normalizers
from tests.evaluation.stored import every_value


@pytest.fixture(scope="module")
def evaluator(zoo_corpus: Corpus) -> TaskEvaluator:
    layout_id, (_, normalizer) = next(iter(measure_normalizers(zoo_corpus).items()))
    made = make_evaluator(zoo_corpus, layout_id, "unseen", normalizer, num_tasks=4)
    assert made is not None
    return made


def row_of(kind: str, split: str, weight_distance: float) -> NoveltyRow:
    return NoveltyRow(
        kind=kind,
        split=split,
        layout="mlp",
        task="digits/1",
        weight_distance=weight_distance,
        error_overlap=0.5,
        accuracy=0.9,
    )


def test_error_overlap_is_intersection_over_union() -> None:
    wrong = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    other = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    assert error_overlap(wrong, other).tolist() == pytest.approx([1 / 3, 0.0, 1.0])


def test_a_copy_has_no_distance_and_full_overlap(evaluator: TaskEvaluator) -> None:
    copies_TD = evaluator.stored.values(torch.arange(len(evaluator.tasks)))
    near = nearness(evaluator, copies_TD)
    # cdist by inner products leaves an error of about the square root of float32 resolution.
    assert float(near.distance_T.max()) < 1e-2
    assert near.overlap_T.tolist() == pytest.approx([1.0] * len(evaluator.tasks))


def test_distance_is_the_root_mean_square_in_units_of_scale(evaluator: TaskEvaluator) -> None:
    values_TD = evaluator.originals_TD
    near = nearness(evaluator, values_TD)
    scale, stored = evaluator.normalizer.scale_D.double(), every_value(evaluator.stored).double()
    for index, value_D in enumerate(values_TD.double()):
        every = ((value_D - stored) / scale).square().mean(dim=1).sqrt()
        assert float(near.distance_T[index]) == pytest.approx(float(every.min()), rel=1e-4)


def test_the_size_of_blocks_changes_no_distance(evaluator: TaskEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    values_TD, stored = evaluator.originals_TD, evaluator.stored
    every_TR = distances(values_TD, every_value(stored), evaluator.normalizer)
    for at_once in (1, 5, len(stored)):
        monkeypatch.setattr("raywgen.corpus.at_once._NETWORKS", at_once)
        distance_T, nearest_T = nearest_stored(values_TD, stored.weights, evaluator.normalizer)
        torch.testing.assert_close(distance_T, every_TR.min(dim=1).values)
        assert torch.equal(nearest_T, every_TR.argmin(dim=1))


def test_rows_name_task_and_kind(evaluator: TaskEvaluator) -> None:
    rows = novelty_rows(evaluator, "original", evaluator.originals_TD, evaluator.accuracy(evaluator.originals_TD))
    assert [row.task for row in rows] == [task.id for task in evaluator.tasks]
    assert {row.kind for row in rows} == {"original"}
    assert median_distance(rows, "original") > 0
    assert median_distance(rows, "generated") == 0


def test_the_distance_is_the_median_over_networks_of_one_kind_on_unseen_tasks() -> None:
    cases = [("generated", "unseen", value) for value in (0.1, 0.2, 9.0)]
    cases += [("original", "unseen", value) for value in (1.0, 2.0, 90.0)]
    cases += [("generated", "seen", value) for value in (5.0, 6.0, 7.0)]
    rows = [row_of(kind, split, value) for kind, split, value in cases]
    assert median_distance(rows, "generated") == pytest.approx(0.2)
    assert median_distance(rows, "original") == pytest.approx(2.0)
    seen = [row for row in rows if row.split == "seen"]
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
    rows = [row_of(kind, "unseen", value) for kind, value in (("generated", distance), ("original", 1.0))]
    baselines = {"unseen_nearest": 85.0, "unseen_average": 50.0, "unseen_noise": 84.0, "unseen_gaussian": 60.0}
    found, sentence = verdict(rows, {**baselines, "unseen_generated": accuracy})
    assert found == word
    assert f"{abs(accuracy - 85.0):.1f} percentage points" in sentence


@pytest.mark.parametrize(("distance", "word"), [(0.05, "replica"), (0.9, "unjudged")])
def test_without_held_out_networks_only_copies_are_judged(distance: float, word: str) -> None:
    rows = [row_of("generated", "seen", distance)]
    figures = {f"seen_{name}": 50.0 for name in ("generated", "nearest", "average", "noise", "gaussian")}
    found, sentence = verdict(rows, figures)
    assert found == word
    assert f"{distance:.2f} standard deviations" in sentence
