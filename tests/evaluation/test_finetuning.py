from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from raywgen.corpus import Corpus, NetworkFacts
from raywgen.evaluation.finetuning import FineTuned, FineTuningConfig, FineTuningError, fine_tune
from raywgen.tasks import FitConfig, FitData, Inputs, Recorded, Task, balanced_accuracy, build_network, build_task, fit
from raywgen.tasks.train_loop import Execution
from raywgen.weights import Layout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network(zoo_corpus: Corpus) -> NetworkFacts:
    return next(iter(zoo_corpus.networks.values()))


@pytest.fixture(scope="module")
def tasks(zoo_corpus: Corpus) -> list[Task]:
    return [build_task(task.recipe) for task in zoo_corpus.tasks.values() if task.split == "unseen"][:2]


def fresh(network: NetworkFacts, seed: int, num: int = 2) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return network.layout.flatten(build_network(network.recipe).state_dict()).expand(num, -1)


def config(
    epochs: int = 2, rates: tuple[float, ...] = (1e-3, 1e-2), execution: Execution = "stacked"
) -> FineTuningConfig:
    return FineTuningConfig(epochs=epochs, learning_rates=list(rates), execution=execution)


def test_equal_starts_give_equal_curves_and_weights(network: NetworkFacts, tasks: list[Task]) -> None:
    module, start_TD = build_network(network.recipe), fresh(network, 0)
    tuned = fine_tune(module, network.layout, {"one": start_TD, "other": start_TD.clone()}, tasks, config())
    assert torch.equal(tuned["one"].accuracy_TE, tuned["other"].accuracy_TE)
    assert torch.equal(tuned["one"].values_TD, tuned["other"].values_TD)
    assert tuned["one"].learning_rate == tuned["other"].learning_rate
    assert tuned["one"].validation_accuracy == tuned["other"].validation_accuracy


@pytest.mark.parametrize("epoch_samples", [0, 130])
def test_a_curve_is_that_of_one_plain_run(network: NetworkFacts, tasks: list[Task], epoch_samples: int) -> None:
    """Going on epoch by epoch changes nothing: the same as one run over all epochs, recorded along the way."""
    module, start_TD = build_network(network.recipe), fresh(network, 0)
    settings = replace(config(3, (3e-3,)), epoch_samples=epoch_samples)
    (tuned,) = fine_tune(module, network.layout, {"a": start_TD}, tasks, settings).values()
    steps = (epoch_samples or len(tasks[0].train_y_S)) // 64
    recorded = fit(
        module,
        Recorded(step=0, state_N=network.layout.unflatten(start_TD)),
        FitData(x=tasks[0].train_x_SF, labels_NS=torch.stack([task.train_y_S for task in tasks])),
        FitConfig(num_steps=3 * steps, learning_rate=3e-3),
        order_seeds=[0, 1],
        record_steps=[epoch * steps for epoch in range(4)],
    )
    for epoch, record in enumerate(recorded):
        for index, task in enumerate(tasks):
            alone = build_network(network.recipe)
            alone.load_state_dict({name: tensor[index] for name, tensor in record.state_N.items()})
            accuracy = balanced_accuracy(alone(task.test_x_SF).unsqueeze(0), task.test_y_S)
            # Batched products round differently; one of 597 images may cross the boundary.
            assert float(tuned.accuracy_TE[index, epoch]) == pytest.approx(float(accuracy), abs=4e-3)
    end_TD = torch.cat([recorded[-1].state_N[spec.name].flatten(1) for spec in network.layout.generated], dim=1)
    torch.testing.assert_close(tuned.values_TD, end_TD, atol=1e-5, rtol=1e-4)


def test_a_start_does_not_depend_on_those_beside_it(network: NetworkFacts, tasks: list[Task]) -> None:
    module = build_network(network.recipe)
    starts = {"a": fresh(network, 0), "b": fresh(network, 1), "c": 3 * fresh(network, 2)}
    together = fine_tune(module, network.layout, starts, tasks, config())
    for name, start_TD in starts.items():
        (alone,) = fine_tune(module, network.layout, {name: start_TD}, tasks, config()).values()
        assert together[name].learning_rate == alone.learning_rate
        torch.testing.assert_close(together[name].values_TD, alone.values_TD, atol=1e-5, rtol=1e-4)


def test_the_rate_is_the_best_on_validation_and_test_samples_choose_nothing(
    network: NetworkFacts, tasks: list[Task]
) -> None:
    module, starts = build_network(network.recipe), {"a": fresh(network, 0)}
    rates = (1e-6, 1e-2, 100.0)
    (honest,) = fine_tune(module, network.layout, starts, tasks, config(2, rates)).values()
    assert honest.learning_rate == 1e-2
    assert max(honest.validation_accuracy, key=lambda rate: honest.validation_accuracy[rate]) == 1e-2
    # With all test labels turned round, the worst rate would look best to whoever chose by them.
    turned = [replace(task, test_y_S=1 - task.test_y_S) for task in tasks]
    (same,) = fine_tune(module, network.layout, starts, turned, config(2, rates)).values()
    assert same.validation_accuracy == honest.validation_accuracy
    assert torch.equal(same.values_TD, honest.values_TD)


def test_validation_samples_are_not_trained_on(network: NetworkFacts, tasks: list[Task]) -> None:
    """Labels that cannot be learned from others are at chance where they are held out, however well they are fitted."""
    noise = torch.Generator().manual_seed(0)
    num = 200
    x_SF = torch.randn(num, tasks[0].train_x_SF.shape[1], generator=noise)
    y_S = torch.randint(0, 2, (num,), generator=noise)
    task = replace(tasks[0], train_inputs=Inputs(x_SF), train_y_S=y_S, test_inputs=Inputs(x_SF), test_y_S=y_S)
    settings = FineTuningConfig(epochs=60, learning_rates=[1e-2, 2e-2], validation=0.5)
    (tuned,) = fine_tune(
        build_network(network.recipe), network.layout, {"a": fresh(network, 0, 1)}, [task], settings
    ).values()
    assert float(tuned.accuracy_TE[0, -1]) > 0.9
    # Standard error of 100 coin tosses is 0.05.
    assert all(score < 0.65 for score in tuned.validation_accuracy.values())


def test_epochs_to_is_the_first_epoch_that_reaches() -> None:
    curve_TE = torch.tensor([[0.5, 0.8, 0.7, 0.9], [0.6, 0.6, 0.6, 0.6]])
    tuned = FineTuned(accuracy_TE=curve_TE, learning_rate=1.0, validation_accuracy={}, values_TD=torch.empty(2, 0))
    assert tuned.epochs_to(0.8).tolist() == [1, torch.inf]
    assert tuned.epochs_to(0.85).tolist() == [3, torch.inf]
    assert tuned.epochs_to(0.5).tolist() == [0, 0]
    assert tuned.epochs_to(torch.tensor([0.9, 0.6])).tolist() == [3, 0]


def test_one_after_another_gives_what_a_stack_gives(network: NetworkFacts, tasks: list[Task]) -> None:
    module, starts = build_network(network.recipe), {"a": fresh(network, 0)}
    (stack,) = fine_tune(module, network.layout, starts, tasks, config(1)).values()
    (alone,) = fine_tune(module, network.layout, starts, tasks, config(1, execution="sequential")).values()
    torch.testing.assert_close(stack.values_TD, alone.values_TD, atol=1e-4, rtol=1e-3)


def test_batch_normalisation_is_trained_in_train_mode_and_judged_in_eval_mode(tasks: list[Task]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    layout = Layout.from_state_dict(module.state_dict())
    start_TD = layout.flatten(module.state_dict()).expand(2, -1)
    (tuned,) = fine_tune(module, layout, {"a": start_TD}, tasks, config(2, (1e-2,))).values()
    assert not module.training
    state = layout.unflatten(tuned.values_TD[0], counters=module.state_dict())
    assert not torch.equal(state["1.running_mean"], torch.zeros(8))
    module.load_state_dict(state)
    accuracy = balanced_accuracy(module(tasks[0].test_x_SF).unsqueeze(0), tasks[0].test_y_S)
    assert float(tuned.accuracy_TE[0, -1]) == pytest.approx(float(accuracy), abs=4e-3)


def test_progress_ends_at_its_total(network: NetworkFacts, tasks: list[Task]) -> None:
    progress: list[tuple[int, int]] = []
    starts = {"a": fresh(network, 0), "b": fresh(network, 1)}
    fine_tune(
        build_network(network.recipe), network.layout, starts, tasks, config(), lambda *step: progress.append(step)
    )
    assert progress[-1] == (2 * 2 * 2 * 3, 2 * 2 * 2 * 3)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_what_cannot_be_trained_is_refused(network: NetworkFacts, tasks: list[Task]) -> None:
    module = build_network(network.recipe)
    with pytest.raises(FineTuningError, match="give at least one"):
        fine_tune(module, network.layout, {}, tasks, config())
    with pytest.raises(FineTuningError, match="start 'a' has shape"):
        fine_tune(module, network.layout, {"a": fresh(network, 0, 3)}, tasks, config())
    few = [replace(tasks[0], train_inputs=Inputs(tasks[0].train_inputs[:2]), train_y_S=tasks[0].train_y_S[:2])]
    with pytest.raises(FineTuningError, match="too few"):
        fine_tune(module, network.layout, {"a": fresh(network, 0, 1)}, few, config())
    with pytest.raises(ValueError, match="learning_rates"):
        FineTuningConfig(learning_rates=[])
    with pytest.raises(ValueError, match="constant"):
        FineTuningConfig(fit=FitConfig(schedule="cosine"))
