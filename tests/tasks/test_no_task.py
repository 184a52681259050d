from __future__ import annotations

import torch

from raywgen.tasks import build_task, draw_condition
from raywgen.tasks.no_task import blank_task
from raywgen.weights import KeyedNoise


def test_words_are_all_that_is_told_and_nothing_is_judged() -> None:
    task = build_task({"name": "blank", "instruction": "resnet20"})
    assert task.recipe["name"] == "blank"
    assert build_task(task.recipe) is task
    assert (task.instruction, blank_task().instruction) == ("resnet20", "")
    condition = draw_condition([task, task], 4, KeyedNoise(0, torch.arange(2), 0))
    assert condition.instructions == ("resnet20", "resnet20")
    assert not condition.samples_BSF.any()
    assert not len(task.test_y_S)
