from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from raywgen.corpus import Corpus
from raywgen.evaluation import architecture_facts
from raywgen.evaluation.architecture_facts import (
    Results,
    collect_results,
    heldout_folds,
    predict,
    rank_correlation,
    trust_of,
)
from raywgen.evaluation.request import TaskRequest
from raywgen.evaluation.select import SelectConfig, measure_trust, select
from raywgen.evaluation.task_features import TaskFeatures, landmarks
from raywgen.generation import ConditionError
from raywgen.generators.bundle import build_generator, save_bundle
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.training.data import data_spec, measure_normalizers

NAMES = ["a", "b", "c"]


def made_up(num: int = 40, splits: list[str] | None = None) -> Results:
    """Architecture `a` is best where the samples' mean is high, `c` where it is low; `b` lies between."""
    generator = torch.Generator().manual_seed(0)
    tasks, rows = [], []
    for number in range(num):
        level = float(torch.randn((), generator=generator))
        samples = level + 0.1 * torch.randn(20, 3, generator=generator)
        labels = torch.arange(20) % 2
        tasks.append(
            TaskRequest(instruction=f"task {number}", samples_SF=samples, labels_S=labels, task_id=str(number))
        )
        rows.append([0.8 + 0.02 * level, 0.805, 0.8 - 0.02 * level])
    return Results(tasks=tasks, splits=splits or ["seen"] * num, names=NAMES, accuracy_TA=np.array(rows))


def data_alone(results: Results) -> TaskRequest:
    return TaskRequest(instruction="", samples_SF=results.tasks[0].samples_SF)


def test_a_prediction_that_depends_on_the_task_beats_the_mean_on_tasks_left_out() -> None:
    results = made_up()
    trust, words = measure_trust(data_alone(results), results, None, SelectConfig())
    predicted, mean = trust
    assert (predicted.answer, mean.answer) == ("predicted", "mean")
    assert predicted.spearman > 0.9
    assert predicted.over_mean - predicted.over_mean_half_width > 0.3
    assert predicted.lost_accuracy < mean.lost_accuracy
    assert predicted.num_tasks == 40
    assert "left out in turn" in words


def test_where_features_say_nothing_the_mean_is_what_is_left() -> None:
    results = made_up()
    noise = np.random.default_rng(0).normal([0.9, 0.8, 0.7], 0.01, size=results.accuracy_TA.shape)
    blind = Results(tasks=results.tasks, splits=results.splits, names=NAMES, accuracy_TA=noise)
    predicted_TA, mean_TA = predict(blind, blind.tasks, data_alone(blind))
    # Noise of 0.01 may be followed a little, the gaps of 0.1 not be lost.
    assert np.abs(predicted_TA - mean_TA).max() < 0.02
    np.testing.assert_allclose(mean_TA[0], noise.mean(axis=0))


def test_tasks_left_out_are_never_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is fitted, features and regression, sees no task that it is measured on."""
    fitted: list[set[str | None]] = []
    usual = TaskFeatures.fit

    def watched(self: TaskFeatures, tasks: Any) -> TaskFeatures:
        fitted.append({task.task_id for task in tasks})
        return usual(self, tasks)

    monkeypatch.setattr(architecture_facts.TaskFeatures, "fit", watched)
    results = made_up(splits=["seen"] * 30 + ["unseen"] * 10)
    measure_trust(data_alone(results), results, None, SelectConfig())
    assert fitted == [{str(number) for number in range(30)}]
    fitted.clear()
    measure_trust(data_alone(results), made_up(), None, SelectConfig())
    folds, _ = heldout_folds(["seen"] * 40, 0)
    assert fitted == [{str(row) for row in kept} for kept, _ in folds]


def test_what_tasks_left_out_did_changes_no_prediction_of_them() -> None:
    results = made_up(splits=["seen"] * 30 + ["unseen"] * 10)
    (kept, held), *_ = heldout_folds(results.splits, 0)[0]
    before, _ = predict(results.rows(kept), results.rows(held).tasks, data_alone(results))
    results.accuracy_TA[held] = np.random.default_rng(0).uniform(size=(10, 3))
    after, _ = predict(results.rows(kept), results.rows(held).tasks, data_alone(results))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("splits", [["seen"] * 23, ["seen"] * 20 + ["unseen"] * 3, ["seen"] * 9 + ["unseen"] * 8])
def test_folds_part_the_tasks(splits: list[str]) -> None:
    folds, _ = heldout_folds(splits, 0)
    for kept, held in folds:
        assert not set(kept) & set(held)
        assert set(kept) | set(held) == set(range(len(splits)))
    held = [row for _, rows in folds for row in rows]
    assert len(held) == len(set(held))
    assert {splits[row] for row in held} == {"unseen"} if len(folds) == 1 else len(held) == len(splits)


def test_rank_correlation_and_lost_accuracy_by_hand() -> None:
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([0.1, 0.2, 0.9])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([0.2, 0.1, 0.9])) == pytest.approx(0.5)
    assert rank_correlation(np.array([1.0, 1, 1]), np.array([0.2, 0.1, 0.9])) == 0
    truth_TA = np.array([[0.9, 0.8, 0.7], [0.5, 0.6, 0.7]])
    mean_TA = np.array([[3.0, 2, 1], [3.0, 2, 1]])
    trust = trust_of("predicted", truth_TA, mean_TA, truth_TA)
    assert (trust.spearman, trust.over_mean, trust.lost_accuracy) == pytest.approx((1, 1, 0))
    assert trust_of("mean", mean_TA, mean_TA, truth_TA).lost_accuracy == pytest.approx(0.1)


def test_landmarks_are_leave_one_out_accuracies() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (30,), generator=generator)
    samples = torch.randn(30, 4, generator=generator) + labels[:, None]
    x, y = samples.double().numpy(), labels.numpy()

    def left_out(make: Any) -> float:
        keep = [np.arange(30) != row for row in range(30)]
        return float(np.mean([make().fit(x[k], y[k]).predict(x[~k])[0] == y[~k][0] for k in keep]))

    found = landmarks(samples, labels)
    assert found[0] == pytest.approx(left_out(NearestCentroid))
    assert found[1] == pytest.approx(left_out(lambda: KNeighborsClassifier(1)))
    assert 0 <= found[2] <= 1
    share = np.bincount(y) / 30
    np.testing.assert_allclose(found[3:], [np.log(3), -(share * np.log(share)).sum()])


def test_the_ridge_landmark_is_that_of_a_fit_without_each_sample() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (24,), generator=generator)
    # Few samples of many features: fitted with itself, every sample would be right.
    samples = torch.randn(24, 20, generator=generator) + 0.5 * labels[:, None]
    x = samples.double().numpy()
    z = np.concatenate([x - x.mean(axis=0), np.ones((24, 1))], axis=1)
    penalty = 1e-2 * np.mean((z**2).sum(axis=1))
    right = []
    for row in range(24):
        kept = np.arange(24) != row
        gram = z[kept].T @ z[kept] + penalty * np.eye(21)
        weight = np.linalg.solve(gram, z[kept].T @ np.eye(3)[labels.numpy()[kept]])
        right.append(int((z[row] @ weight).argmax()) == int(labels[row]))
    assert landmarks(samples, labels)[2] == pytest.approx(np.mean(right))
    assert np.mean(right) < 0.9


def test_every_group_of_features_weighs_the_same_however_many_numbers_it_has() -> None:
    results = made_up()
    first = results.tasks[0]
    requests = {
        "data": TaskRequest(instruction="", samples_SF=first.samples_SF),
        "data and landmarks": TaskRequest(instruction="", samples_SF=first.samples_SF, labels_S=first.labels_S),
    }
    for num_groups, like in enumerate(requests.values(), start=1):
        features_TE = TaskFeatures(like).fit(results.tasks).transform(results.tasks)
        np.testing.assert_allclose(features_TE.mean(axis=0), 0, atol=1e-9)
        # Numbers that are equal for all tasks, such as how many classes there are, vary nowhere.
        assert num_groups - 1 < features_TE.var(axis=0).sum() <= num_groups + 1e-9


def test_landmarks_do_not_depend_on_how_classes_are_numbered() -> None:
    samples = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 2
    np.testing.assert_allclose(landmarks(samples, labels), landmarks(samples, 1 - labels))
    np.testing.assert_allclose(landmarks(samples, labels), landmarks(samples, 7 * labels))


def test_the_requested_task_stays_unknown(zoo_corpus: Corpus, tmp_path: Path) -> None:
    task = next(iter(zoo_corpus.tasks))
    names = [network.name for network in zoo_corpus.networks.values()]
    assert task not in {one.task_id for one in collect_results(zoo_corpus, names, leave_out=task).tasks}
    out = tmp_path / "selected.json"
    selected = select(SelectConfig(corpus=zoo_corpus.location, task=task, out=str(out)))
    assert {one.architecture for one in selected.candidates} == set(names)
    scores = [one.predicted for one in selected.candidates]
    assert all(score is not None and 0.49 < score <= 1 for score in scores)
    assert scores == sorted(scores, key=lambda score: -(score or 0))
    assert json.loads(out.read_text())["selected"]["by"] == "predicted"


def test_results_are_means_over_the_ends_of_trajectories(zoo_corpus: Corpus) -> None:
    names = [network.name for network in zoo_corpus.networks.values()]
    results = collect_results(zoo_corpus, names)
    for row, task in enumerate(results.tasks[:5]):
        for column, name in enumerate(names):
            facts = zoo_corpus.select(task_id=task.task_id, architecture=name, step=120)
            assert results.accuracy_TA[row, column] == pytest.approx(np.mean(facts.column("test_accuracy").to_pylist()))


def test_a_generator_ranks_architectures_that_no_network_is_stored_of(zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = IGPGConfig(
        tokenizer=TokenizerConfig(quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=16),
        prior=PriorConfig(width=16, num_layers=1, num_heads=2),
    )
    save_bundle(
        build_generator("igpg", config, measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0), tmp_path, {}
    )
    task_settings: dict[str, Any] = {"corpus": zoo_corpus.location, "task": next(iter(zoo_corpus.tasks)), "out": ""}
    networks = ["mlp-64-6-2", [64, 3, 2]]
    selected = select(SelectConfig(**task_settings, networks=networks, generator=str(tmp_path), best_of=1))
    assert selected.by == "generated"
    strange = next(one for one in selected.candidates if one.architecture == "mlp-64-3-2")
    assert (strange.predicted, strange.num_values) == (None, 64 * 3 + 3 + 3 * 2 + 2)
    assert strange.generated is not None
    losses = [-(one.generated or 0) for one in selected.candidates]
    assert losses == sorted(losses)
    assert losses[0] > 0
    with pytest.raises(ConditionError, match="no network of 'mlp-64-3-2'"):
        select(SelectConfig(**task_settings, networks=networks, by="predicted"))


def test_what_is_missing_is_said(zoo_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs generator"):
        SelectConfig(by="generated")
    with pytest.raises(ConditionError, match="instruction and labelled samples"):
        select(SelectConfig(corpus=zoo_corpus.location, instruction="Is it?", generator=str(tmp_path)))
