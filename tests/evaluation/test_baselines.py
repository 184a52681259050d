from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from raywgen.corpus import Corpus
from raywgen.evaluation.baselines import BASELINES, SHARED_START_BASELINES, random_start
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.stored_networks import CoordinateMoments
from raywgen.evaluation.task_evaluator import TaskEvaluator, make_evaluator
from raywgen.generation.statistics import some_inputs
from raywgen.tasks import FitConfig, FitData, Recorded, build_network, build_task, fit
from raywgen.training.data import measure_normalizers
from raywgen.weights import Layout
from tests.evaluation.stored import every_value

CONFIG = EvaluateConfig(best_of=3, gradient_steps=40)


@pytest.fixture(scope="module")
def evaluator(zoo_corpus: Corpus) -> TaskEvaluator:
    layout_id, (_, normalizer) = next(iter(measure_normalizers(zoo_corpus).items()))
    made = make_evaluator(zoo_corpus, layout_id, "unseen", normalizer, num_tasks=4)
    assert made is not None
    return made


EVERY = BASELINES | SHARED_START_BASELINES


@pytest.mark.parametrize("name", EVERY)
def test_every_baseline_keeps_the_budget_and_repeats(name: str, evaluator: TaskEvaluator) -> None:
    values_TnD = EVERY[name](evaluator, CONFIG)
    assert values_TnD.shape[0] == len(evaluator.tasks)
    assert 1 <= values_TnD.shape[1] <= CONFIG.best_of
    assert values_TnD.shape[2] == evaluator.layout.num_values
    assert bool(values_TnD.isfinite().all())
    assert torch.equal(values_TnD, EVERY[name](evaluator, CONFIG))


@pytest.mark.parametrize("name", ["gaussian", "nearest_condition", "nearest_loss", "noise", "gradient"])
def test_a_baseline_that_chooses_has_as_many_different_candidates_as_the_generator(
    name: str, evaluator: TaskEvaluator
) -> None:
    values_TnD = EVERY[name](evaluator, CONFIG)
    assert values_TnD.shape[1] == CONFIG.best_of
    for values_nD in values_TnD:
        assert len(values_nD.unique(dim=0)) == CONFIG.best_of


@pytest.mark.parametrize("name", BASELINES)
def test_the_size_of_blocks_changes_no_baseline(
    name: str, evaluator: TaskEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_TnD = BASELINES[name](evaluator, CONFIG)
    for at_once in (1, 5):
        monkeypatch.setattr("raywgen.corpus.at_once._NETWORKS", at_once)
        # Means of blocks are rounded each for itself; chosen networks are the stored ones.
        tolerance = 1e-6 if name in ("average", "gaussian") else 0.0
        torch.testing.assert_close(BASELINES[name](evaluator, CONFIG), whole_TnD, rtol=tolerance, atol=tolerance)


def test_average_and_gaussian_of_one_block_are_those_of_torch(evaluator: TaskEvaluator) -> None:
    stored_RD, normalizer = every_value(evaluator.stored), evaluator.normalizer
    assert torch.equal(BASELINES["average"](evaluator, CONFIG)[0, 0], stored_RD.mean(dim=0))
    moments = CoordinateMoments.measure(evaluator.stored.weights, stored_RD.shape[1], normalizer.normalise)
    assert torch.equal(moments.deviation_D.float(), normalizer.normalise(stored_RD).std(dim=0))


def test_noise_lies_about_the_best_stored_network_with_the_wanted_spread(evaluator: TaskEvaluator) -> None:
    best_TD = evaluator.normalizer.normalise(BASELINES["nearest_loss"](evaluator, CONFIG)[:, 0])
    noisy_TnD = evaluator.normalizer.normalise(BASELINES["noise"](evaluator, replace(CONFIG, noise=0.3)))
    offset_TnD = noisy_TnD - best_TD.unsqueeze(1)
    # Some thousand normal numbers: their deviation is known to 2 %.
    assert float(offset_TnD.std()) == pytest.approx(0.3, rel=0.1)
    assert float(offset_TnD.mean()) == pytest.approx(0.0, abs=0.03)


def test_gradient_is_adam_on_all_examples_for_the_steps_of_the_config(evaluator: TaskEvaluator) -> None:
    condition, count = evaluator.condition.repeat(CONFIG.best_of), len(evaluator.tasks) * CONFIG.best_of
    (end,) = fit(
        evaluator.module,
        Recorded(step=0, state_N=evaluator.layout.unflatten(evaluator.normalizer.base_D.expand(count, -1))),
        FitData(x=condition.samples_BSF, labels_NS=condition.labels_BS),
        FitConfig(
            num_steps=CONFIG.gradient_steps,
            batch_size=condition.labels_BS.shape[1] // 2,
            learning_rate=CONFIG.gradient_learning_rate,
        ),
        order_seeds=list(range(count)),
        record_steps=[CONFIG.gradient_steps],
    )
    fitted_TnD = SHARED_START_BASELINES["gradient"](evaluator, CONFIG)
    for row, value_D in enumerate(fitted_TnD.flatten(0, 1)):
        state = {name: tensor[row] for name, tensor in end.state_N.items()}
        torch.testing.assert_close(value_D, evaluator.layout.flatten(state), rtol=0, atol=1e-6)


def test_retrieval_gives_stored_networks(evaluator: TaskEvaluator) -> None:
    for name in ("nearest_condition", "nearest_loss"):
        for value_D in BASELINES[name](evaluator, CONFIG).flatten(0, 1):
            assert bool((every_value(evaluator.stored) == value_D).all(dim=1).any())


def test_retrieval_by_condition_finds_the_task_itself_when_it_is_stored(zoo_corpus: Corpus) -> None:
    layout_id, (_, normalizer) = next(iter(measure_normalizers(zoo_corpus).items()))
    seen = make_evaluator(zoo_corpus, layout_id, "seen", normalizer, num_tasks=6)
    assert seen is not None
    found_TD = BASELINES["nearest_condition"](seen, CONFIG)[:, 0]
    for task, value_D in zip(seen.tasks, found_TD, strict=True):
        row = int((every_value(seen.stored) == value_D).all(dim=1).nonzero()[0])
        assert seen.stored.task_ids[row] == task.id


def test_retrieval_by_loss_is_the_lowest_loss_of_all(evaluator: TaskEvaluator) -> None:
    chosen_TD = BASELINES["nearest_loss"](evaluator, CONFIG)[:, 0]
    everyone = every_value(evaluator.stored).expand(len(evaluator.tasks), -1, -1)
    lowest_T = evaluator.example_loss(everyone).min(dim=1).values
    torch.testing.assert_close(evaluator.example_loss(chosen_TD.unsqueeze(1))[:, 0], lowest_T)


def test_gaussian_draws_have_the_mean_and_the_spread_of_the_stored_networks(evaluator: TaskEvaluator) -> None:
    config = replace(CONFIG, best_of=400)
    drawn_RD = evaluator.normalizer.normalise(BASELINES["gaussian"](evaluator, config).flatten(0, 1))
    stored_RD = evaluator.normalizer.normalise(every_value(evaluator.stored))
    std_D = stored_RD.std(dim=0)
    moves_D = std_D > 1e-6
    num = len(drawn_RD)
    # Of 1,600 draws a standard deviation is off by 1.8 % and a mean by a fortieth of it; some hundred are looked at.
    torch.testing.assert_close(drawn_RD.std(dim=0)[moves_D], std_D[moves_D], rtol=5 / (2 * num) ** 0.5, atol=0)
    off_D = (drawn_RD.mean(dim=0) - stored_RD.mean(dim=0))[moves_D] / std_D[moves_D]
    assert float(off_D.abs().max()) < 5 / num**0.5


def test_gradient_lowers_the_loss_on_the_examples(evaluator: TaskEvaluator) -> None:
    before_T = evaluator.example_loss(SHARED_START_BASELINES["shared_start"](evaluator, CONFIG))[:, 0]
    after_T = evaluator.example_loss(SHARED_START_BASELINES["gradient"](evaluator, CONFIG)).min(dim=1).values
    assert bool((after_T < before_T).all())


def test_choose_takes_the_lowest_loss(evaluator: TaskEvaluator) -> None:
    values_TnD = BASELINES["gaussian"](evaluator, CONFIG)
    chosen_TD = evaluator.choose(values_TnD)
    torch.testing.assert_close(
        evaluator.example_loss(chosen_TD.unsqueeze(1))[:, 0], evaluator.example_loss(values_TnD).min(dim=1).values
    )


def test_random_starts_differ_from_each_other(evaluator: TaskEvaluator, zoo_corpus: Corpus) -> None:
    recipe = zoo_corpus.networks[evaluator.layout.id].recipe
    fresh_TnD = random_start(evaluator, CONFIG, recipe)
    assert fresh_TnD.shape[1] == CONFIG.best_of
    assert len(fresh_TnD[0].unique(dim=0)) == CONFIG.best_of


def test_accuracy_equals_a_plain_modules_own(evaluator: TaskEvaluator, zoo_corpus: Corpus) -> None:
    network = zoo_corpus.networks[evaluator.layout.id]
    accuracy_T = evaluator.accuracy(evaluator.originals_TD)
    for index, task in enumerate(evaluator.tasks):
        module = build_network(network.recipe)
        module.load_state_dict(evaluator.layout.unflatten(evaluator.originals_TD[index]), strict=True)
        right_S = module(task.test_x_SF).argmax(dim=1) == task.test_y_S
        recall = [float(right_S[task.test_y_S == label].float().mean()) for label in (0, 1)]
        assert float(accuracy_T[index]) == pytest.approx(sum(recall) / 2, abs=1e-5)


def test_originals_of_seen_tasks_were_never_streamed_to_a_generator(zoo_corpus: Corpus) -> None:
    layout_id, (_, normalizer) = next(iter(measure_normalizers(zoo_corpus).items()))
    seen = make_evaluator(zoo_corpus, layout_id, "seen", normalizer, num_tasks=12)
    assert seen is not None
    trained = zoo_corpus.values(zoo_corpus.select(layout_id=layout_id, split="train"))
    assert all(not bool((trained == value_D).all(dim=1).any()) for value_D in seen.originals_TD)
    assert all(build_task(task.recipe).id in seen.stored.task_ids for task in seen.tasks)


def test_candidates_may_be_judged_by_statistics_of_the_tasks_own_inputs(evaluator: TaskEvaluator) -> None:
    module = nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    layout = Layout.from_state_dict(module.state_dict())
    plain_D = layout.flatten(module.state_dict())
    values_TnD = plain_D + 0.1 * torch.rand(4, 2, len(plain_D), generator=torch.Generator().manual_seed(0))
    inputs = [some_inputs(task, 100) for task in evaluator.tasks]
    assert all(x_SF.shape == (100, 64) and len(x_SF.unique(dim=0)) > 95 for x_SF in inputs)
    normed = replace(evaluator, module=module, layout=layout, unlabelled=inputs)
    chosen_TD = normed.choose(values_TnD)
    for value_D, x_SF in zip(chosen_TD, inputs, strict=True):
        state = layout.unflatten(value_D, counters=module.state_dict())
        hidden_SH = nn.functional.linear(x_SF, state["0.weight"], state["0.bias"])
        torch.testing.assert_close(state["1.running_mean"], hidden_SH.mean(dim=0), rtol=1e-3, atol=1e-4)
    assert not torch.equal(replace(normed, unlabelled=None).choose(values_TnD), chosen_TD)
