"""What the whole-network benchmark compares with, on tasks of a few digits."""

from __future__ import annotations

import pytest
import torch

from raywgen.benchmarks.unseen_tasks import UnseenTasks, fitted, fully_trained
from raywgen.tasks import FitConfig, FitData, Recorded, build_network, build_task, draw_few_shot, fit, repeat_state
from raywgen.weights import KeyedNoise, Layout

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = [{"name": "images", "path": "digits", "classes": classes, "limit": 60} for classes in ([0, 1, 2], [3, 5, 8])]


@pytest.fixture(scope="module")
def unseen() -> UnseenTasks:
    module = build_network({"name": "mlp", "widths": [64, 8, 3]}).eval()
    tasks = [build_task(recipe) for recipe in RECIPES]
    layout = Layout.from_state_dict(module.state_dict())
    condition, _ = draw_few_shot(tasks, 4, 1, KeyedNoise(0, torch.arange(2)))
    originals_TD = layout.flatten(module.state_dict()).expand(2, -1)
    return UnseenTasks(layout=layout, module=module, tasks=tasks, condition=condition, originals_TD=originals_TD)


def test_fitting_is_that_of_each_task_alone_on_its_examples(unseen: UnseenTasks) -> None:
    start_D = unseen.originals_TD[0]
    found = fitted(unseen, start_D, (1e-2,), (5, 20))
    config = FitConfig(learning_rate=1e-2, num_steps=20, batch_size=12)
    begin = Recorded(step=0, state_N=repeat_state(unseen.layout.unflatten(start_D), 1))
    scores = []
    for index in range(2):
        condition = unseen.condition_of(index)
        data = FitData(x=condition.samples_BSF[0], labels_NS=condition.labels_BS[0])
        (end,) = fit(unseen.module, begin, data, config, order_seeds=[index], record_steps=[20])
        values_D = unseen.layout.flatten({name: tensor[0] for name, tensor in end.state_N.items()})
        scores.append(float(unseen.accuracy(values_D.expand(2, -1))[index]))
    # An accuracy moves in steps of a test image, so this is equality.
    assert found.percent[1e-2, 20] == pytest.approx(50 * sum(scores), abs=1e-3)
    assert found.best() == max(found.percent, key=lambda key: found.percent[key])


def test_each_task_can_be_told_the_condition_of_the_next(unseen: UnseenTasks) -> None:
    told, num = unseen.told_the_next_task(), len(unseen.tasks)
    assert num > 1
    for index in range(num):
        other = unseen.condition_of((index + 1) % num)
        assert torch.equal(told.condition_of(index).samples_BSF, other.samples_BSF)
        assert told.condition_of(index).instructions == other.instructions
        assert told.tasks[index] is unseen.tasks[index]


def test_the_stored_network_with_the_lowest_loss_on_the_examples_is_the_best(unseen: UnseenTasks) -> None:
    config = FitConfig(learning_rate=1e-2, num_steps=100, batch_size=12)
    begin = Recorded(step=0, state_N=repeat_state(unseen.layout.unflatten(unseen.originals_TD[0]), 2))
    data = FitData(x=unseen.condition.samples_BSF, labels_NS=unseen.condition.labels_BS)
    (end,) = fit(unseen.module, begin, data, config, order_seeds=[0, 1], record_steps=[100])
    states = [{name: tensor[n] for name, tensor in end.state_N.items()} for n in (1, 0)]
    stored_ND = torch.stack([unseen.layout.flatten(state) for state in states])
    assert unseen.best_of(stored_ND).tolist() == [1, 0]


def test_full_training_reaches_the_level_of_the_start_at_once_and_of_no_network_above_all(
    unseen: UnseenTasks,
) -> None:
    start_D = unseen.originals_TD[0]
    found = fully_trained(unseen, start_D, (1e-2,), unseen.originals_TD)
    assert 5 <= found.steps <= 50
    assert 0 < found.milliseconds < float("inf")
