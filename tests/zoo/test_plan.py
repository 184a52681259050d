from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from raywgen.tasks import TaskError, build_network
from raywgen.tasks.digits import digit_images
from raywgen.weights import Layout
from raywgen.zoo import ZooConfig
from raywgen.zoo.plan import ZooPlan, plan_zoo

SMALL: dict[str, Any] = {
    "num_seen_tasks": 20,
    "num_validation_tasks": 4,
    "num_unseen_tasks": 6,
    "seeds_per_task": 3,
    "stack_size": 16,
}


@pytest.fixture(scope="module")
def plan() -> ZooPlan:
    return plan_zoo(ZooConfig(**SMALL))


def digits_of(plan: ZooPlan, *splits: str) -> set[frozenset[int]]:
    return {frozenset(task.recipe["labels"]) for task in plan.tasks if task.split in splits}


def test_at_the_defaults_200_tasks_are_seen_and_20_held_out() -> None:
    plan = plan_zoo(ZooConfig())
    assert len(digits_of(plan, "seen")) >= 200
    assert len(digits_of(plan, "unseen")) >= 20
    assert len(plan.starts) >= 2
    assert all(700 <= start.network.layout.num_values <= 1300 for start in plan.starts)


def test_the_complement_of_a_held_out_task_is_asked_nowhere_else() -> None:
    plan = plan_zoo(ZooConfig())
    everything = frozenset(range(10))
    held_out, rest = digits_of(plan, "unseen"), digits_of(plan, "seen", "validation")
    assert held_out.isdisjoint(rest)
    assert {everything - digits for digits in held_out}.isdisjoint(rest)
    assert {everything - digits for digits in digits_of(plan, "validation")}.isdisjoint(digits_of(plan, "seen"))


def test_tasks_are_split_whole_and_a_trajectory_of_each_seen_task_is_held_out(plan: ZooPlan) -> None:
    task_split = {task.recipe["name"] + str(task.recipe["labels"]): task.split for task in plan.tasks}
    splits: dict[str, dict[int, str]] = {}
    for stack in plan.stacks:
        for spec in stack.trajectories:
            name = spec.task_recipe["name"] + str(spec.task_recipe["labels"])
            splits.setdefault(name, {})[spec.trajectory] = spec.split
    assert splits.keys() == task_split.keys()
    for name, by_trajectory in splits.items():
        if task_split[name] == "seen":
            assert by_trajectory == {0: "train", 1: "train", 2: "heldout"}
        else:
            assert set(by_trajectory.values()) == {task_split[name]}


def test_every_network_is_planned_once_per_architecture(plan: ZooPlan) -> None:
    for start in plan.starts:
        trajectories = [
            (str(spec.task_recipe), spec.trajectory)
            for stack in plan.stacks
            if stack.start is start
            for spec in stack.trajectories
        ]
        assert len(trajectories) == len(set(trajectories)) == 30 * 3


def test_stacks_hold_one_split_and_at_most_their_size(plan: ZooPlan) -> None:
    assert len({stack.name for stack in plan.stacks}) == len(plan.stacks)
    for stack in plan.stacks:
        assert 1 <= len(stack.trajectories) <= 16
        assert len({spec.split for spec in stack.trajectories}) == 1


def test_data_orders_differ_between_trajectories_and_are_shared_by_architectures(plan: ZooPlan) -> None:
    orders: dict[tuple[str, int], set[int]] = {}
    for stack in plan.stacks:
        for spec in stack.trajectories:
            orders.setdefault((str(spec.task_recipe), spec.trajectory), set()).add(spec.order_seed)
    assert all(len(seeds) == 1 for seeds in orders.values())
    assert len({seed for seeds in orders.values() for seed in seeds}) == len(orders)


def test_networks_of_their_own_start_have_a_seed_for_each_trajectory() -> None:
    def seeds(**changes: Any) -> dict[tuple[str, int], int]:
        stacks = plan_zoo(ZooConfig(**SMALL, start="own", **changes)).stacks
        return {
            (str(spec.task_recipe), spec.trajectory): spec.start_seed for stack in stacks for spec in stack.trajectories
        }

    first, other = seeds(), seeds(seed=1)
    assert len(set(first.values())) == len(first) == 30 * 3
    assert not set(first.values()) & set(other.values())


def test_the_plan_depends_on_the_seed_alone() -> None:
    first, again, other = (plan_zoo(ZooConfig(**SMALL, seed=seed)) for seed in (0, 0, 1))
    assert [stack.trajectories for stack in first.stacks] == [stack.trajectories for stack in again.stacks]
    for one, two in zip(first.starts, again.starts, strict=True):
        assert all(torch.equal(tensor, two.state[name]) for name, tensor in one.state.items())
    assert digits_of(first, "unseen") != digits_of(other, "unseen")
    assert not all(torch.equal(t, other.starts[0].state[name]) for name, t in first.starts[0].state.items())


def test_stacking_does_not_change_what_is_planned() -> None:
    config = ZooConfig(**SMALL)
    other = plan_zoo(dataclasses.replace(config, stack_size=7))
    trajectories = {spec for stack in plan_zoo(config).stacks for spec in _hashable(stack.trajectories)}
    assert trajectories == {spec for stack in other.stacks for spec in _hashable(stack.trajectories)}


def _hashable(trajectories: Any) -> list[tuple[str, str, int, int]]:
    return [(str(spec.task_recipe), spec.split, spec.trajectory, spec.order_seed) for spec in trajectories]


def test_a_start_is_what_its_network_holds(plan: ZooPlan) -> None:
    for start in plan.starts:
        assert Layout.from_state_dict(start.state).form_id == start.network.layout.form_id
        build_network(start.network.recipe).load_state_dict(start.state, strict=True)


def test_tasks_show_labelled_training_images_only() -> None:
    plan = plan_zoo(ZooConfig(**SMALL, num_condition_samples=32))
    train_x, _, test_x, _ = digit_images()
    train, test = ({row.numpy().tobytes() for row in x} for x in (train_x, test_x))
    for task in plan.tasks:
        shown = {row.numpy().tobytes() for row in task.samples_SF}
        assert task.samples_SF.shape[0] == task.labels_S.shape[0] == 32
        assert shown <= train
        assert shown.isdisjoint(test)
    assert len({task.samples_SF.numpy().tobytes() for task in plan.tasks}) == len(plan.tasks), "each its own"


def test_too_many_tasks_are_refused() -> None:
    with pytest.raises(TaskError, match="num_seen_tasks=2000"):
        plan_zoo(ZooConfig(num_seen_tasks=2000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds_per_task": 0}, "seeds_per_task=0"),
        ({"networks": [[64, 4, 3]]}, "64 pixels to 2 classes"),
        ({"networks": [[64, 4, 2], [64, 4, 2]]}, "each once"),
        ({"checkpoint_steps": [500, 450]}, "ascending"),
        ({"checkpoint_steps": [600]}, "from 0 to num_steps=500"),
        ({"num_seen_tasks": -1}, "num_seen_tasks=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"num_seen_tasks": 0, "num_validation_tasks": 0, "num_unseen_tasks": 0}, "ask for a task"),
    ],
)
def test_settings_that_make_no_zoo_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZooConfig(**changes)
