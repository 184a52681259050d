import json

import pytest
import torch

from raywgen.tasks import TaskError, build_task, draw_condition
from raywgen.weights import KeyedNoise


def test_a_task_is_built_once_and_again_from_its_recipe() -> None:
    task = build_task({"name": "digits-subset", "labels": [1, 4, 7]})
    assert task.id == "digits/1-4-7"
    assert build_task(json.loads(json.dumps(task.recipe))) is task
    assert build_task({"name": "digits-subset", "labels": [1, 4]}) is not task


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "digit-subset", "labels": [1]}, "unknown task 'digit-subset'; did you mean 'digits-subset'"),
        ({"labels": [1]}, "unknown task ''"),
        ({"name": "digits-subset", "digits": [1]}, "does not take"),
    ],
)
def test_unknown_recipes_say_what_is_known(recipe: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_task(recipe)


def test_a_condition_shows_training_images_with_their_labels() -> None:
    tasks = [build_task({"name": "digits-subset", "labels": labels}) for labels in ([0, 1], [2, 3, 4])]
    noise = KeyedNoise(7, torch.tensor([10, 11]))
    shown = draw_condition(tasks, 64, noise)
    assert shown.samples_BSF.shape == (2, 64, 64)
    assert shown.instructions == ("Is the digit one of 0, 1?", "Is the digit one of 2, 3, 4?")
    for task, samples_SF, labels_S in zip(tasks, shown.samples_BSF, shown.labels_BS, strict=True):
        label_of = {
            row.numpy().tobytes(): int(label) for row, label in zip(task.train_x_SF, task.train_y_S, strict=True)
        }
        assert [label_of[row.numpy().tobytes()] for row in samples_SF] == labels_S.tolist()


def test_a_condition_depends_on_its_own_key_alone() -> None:
    tasks = [build_task({"name": "digits-subset", "labels": labels}) for labels in ([0, 1], [2, 3, 4])]
    both = draw_condition(tasks, 8, KeyedNoise(7, torch.tensor([10, 11])))
    second = draw_condition(tasks[1:], 8, KeyedNoise(7, torch.tensor([11])))
    torch.testing.assert_close(both.samples_BSF[1], second.samples_BSF[0], rtol=0, atol=0)
