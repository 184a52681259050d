"""A start that is trained for all seen tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raywgen import actor_pool
from raywgen.tasks import Task, TaskError, balanced_accuracy, build_network, build_task
from raywgen.tasks.fitted_head import fitted_logits
from raywgen.weights import StateDict
from raywgen.weights.cache import FOLDER
from raywgen.zoo import ZooConfig, train_zoo
from raywgen.zoo.config import ZooTasks
from raywgen.zoo.meta_start import meta_trained
from raywgen.zoo.plan import initial_state
from tests.text_encoders import SIGNS, make_encoder, make_sentences

GROUPS = ([[0], [1]], [[2], [3]], [[0], [2]], [[1], [3]], [[0], [3]], [[1], [2]])
ADAPTER = {"name": "lora", "rank": 2, "targets": ["query", "value"], "train_head": ["classifier"]}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    shared = {"name": "sentence-groups", "path": make_sentences(tmp_path / "signs.parquet"), "class_names": SIGNS}
    shared |= {"base": make_encoder(tmp_path / "encoder"), "first_layer": 1, "max_tokens": 8}
    return [build_task(shared | {"groups": groups}) for groups in GROUPS]


def network(task: Task, head: str = "fitted") -> dict[str, Any]:
    base = {"name": "upper-layers", "path": task.recipe["base"], "first_layer": 1, "num_classes": 2, "head": head}
    return ADAPTER | {"base": base}


def accuracy(recipe: dict[str, Any], state: StateDict, task: Task) -> float:
    """Accuracy on test sentences of a head that is fitted to two training sentences of each class."""
    few_S = torch.cat([(task.train_y_S == label).nonzero().flatten()[:2] for label in (0, 1)])
    state_1 = {name: tensor.unsqueeze(0) for name, tensor in state.items()}
    support_1SF, labels_1S = task.train_x_SF[few_S].unsqueeze(0), task.train_y_S[few_S].unsqueeze(0)
    logits_1SC = fitted_logits(build_network(recipe).eval(), state_1, support_1SF, labels_1S, task.test_x_SF[None])
    return float(balanced_accuracy(logits_1SC, task.test_y_S)[0])


def test_it_helps_tasks_that_it_was_not_trained_on(tasks: list[Task]) -> None:
    recipe = network(tasks[0])
    state = initial_state(recipe, 0)
    module = build_network(recipe).eval()
    trained = meta_trained(module, state, tasks[:4], num_steps=40, learning_rate=0.05, seed=0)
    assert trained.keys() == state.keys()
    head = [name for name in state if name.startswith("classifier")]
    assert all(torch.equal(trained[name], state[name]) for name in head)
    assert not any(torch.equal(trained[name], state[name]) for name in state if name not in head)
    assert not any(tensor.requires_grad for tensor in trained.values())
    before, after = (sum(accuracy(recipe, one, task) for task in tasks[4:]) / 2 for one in (state, trained))
    assert after > before + 0.1
    again = meta_trained(module, state, tasks[:4], num_steps=40, learning_rate=0.05, seed=0)
    assert all(torch.equal(trained[name], again[name]) for name in state)


def test_heads_are_judged_by_other_samples_than_they_are_fitted_to(
    tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, task, seen = network(tasks[0]), tasks[0], []

    def noted(module: nn.Module, state_N: StateDict, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        seen.extend(torch.cat([support, query], dim=1))
        return fitted_logits(module, state_N, support, labels, query)

    monkeypatch.setattr("raywgen.zoo.meta_start.fitted_logits", noted)
    meta_trained(
        build_network(recipe).eval(), initial_state(recipe, 0), [task], num_steps=1, learning_rate=0.05, seed=0
    )
    # It has 40 samples, so both halves are all of them. Some of its sentences are equal.
    assert len(seen) == 8
    assert all(sorted(x_SF.tolist()) == sorted(task.train_x_SF.tolist()) for x_SF in seen)


def test_what_it_needs_is_named(tasks: list[Task]) -> None:
    recipe = network(tasks[0], head="trained")
    state, options = initial_state(recipe, 0), {"num_steps": 1, "learning_rate": 0.1, "seed": 0}
    with pytest.raises(TaskError, match="start=meta: only a head that is fitted"):
        meta_trained(build_network(recipe), state, tasks, **options)
    fitted = network(tasks[0])
    with pytest.raises(TaskError, match="give num_seen_tasks above 0"):
        meta_trained(build_network(fitted), state, [], **options)


def test_a_zoo_tells_how_much_of_its_start_is_trained(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_pool, "_SECONDS_BETWEEN_SHARES", 0.0)
    named = {name: tasks[0].recipe[name] for name in ("path", "class_names", "base", "first_layer", "max_tokens")}
    config = ZooConfig(
        tasks=ZooTasks(kind="sentence-groups", classes=[0, 1, 2, 3], **named),
        networks=[network(tasks[0])],
        num_seen_tasks=2,
        num_validation_tasks=0,
        num_unseen_tasks=1,
        seeds_per_task=1,
        start="meta",
        branch_steps=4,
        num_steps=2,
        checkpoint_steps=[2],
        num_condition_samples=8,
    )
    done: list[tuple[int, int]] = []
    said: list[str] = []
    train_zoo(config, f"{tasks[0].recipe['path']}-zoo", lambda *one: done.append(one), said.append, distributed=False)
    assert done[:4] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {total for _, total in done[4:]} == {3 * 2}
    assert any(line.startswith("start=meta: 4 steps by the loss of all seen tasks") for line in said)
