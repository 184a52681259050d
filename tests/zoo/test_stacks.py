from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raywgen.corpus import Corpus, commit_corpus
from raywgen.tasks import Recorded, balanced_accuracy, balanced_cross_entropy, build_network, build_task
from raywgen.zoo.plan import plan_zoo
from raywgen.zoo.stacks import train_stack, write_stack
from tests.conftest import TINY_ZOO


def recorded(states: list[dict[str, torch.Tensor]]) -> list[Recorded]:
    return [Recorded(step=step, state_N=s) for step, s in zip(TINY_ZOO.checkpoint_steps, states, strict=True)]


def test_networks_learn_their_tasks_and_the_facts_say_how_well(zoo_corpus: Corpus) -> None:
    facts = zoo_corpus.facts.to_pylist()
    trained = [row for row in facts if row["split"] != "base" and row["step"] == 120]
    # Chance is 0.5; 120 steps of four to six hidden units reach 0.69.
    assert sum(row["test_accuracy"] for row in trained) / len(trained) > 0.65
    for row in trained[:6]:
        module = build_network(zoo_corpus.networks[row["layout_id"]].recipe)
        module.load_state_dict(zoo_corpus.state_dict(row["checkpoint_id"]), strict=True)
        task = build_task(zoo_corpus.tasks[row["task_id"]].recipe)
        accuracy = balanced_accuracy(module(task.test_x_SF).unsqueeze(0), task.test_y_S)
        # One image of the rarer class is worth half a point.
        assert row["test_accuracy"] == pytest.approx(float(accuracy), abs=0.006)
        loss = balanced_cross_entropy(module(task.train_x_SF).detach().unsqueeze(0), task.train_y_S)
        assert row["train_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_trajectories_start_at_the_shared_start(zoo_corpus: Corpus) -> None:
    starts = [row for row in zoo_corpus.facts.to_pylist() if row["split"] == "base"]
    assert len(starts) == 2
    for start in starts:
        others = [row for row in zoo_corpus.facts.to_pylist() if row["base_id"] == start["checkpoint_id"]]
        assert len(others) == (12 + 3 + 4) * 2 * 2
        base_D = zoo_corpus.base_values(start["layout_id"])
        assert base_D is not None
        assert torch.equal(base_D, zoo_corpus.values(zoo_corpus.select(checkpoint_id=start["checkpoint_id"]))[0])


def test_two_data_orders_of_a_task_are_nearer_than_two_tasks(zoo_corpus: Corpus) -> None:
    layout_id = next(iter(zoo_corpus.networks))
    rows = zoo_corpus.select(layout_id=layout_id, step=120)
    values_ND = zoo_corpus.values(rows)
    tasks = rows.column("task_id").to_pylist()
    distance_NN = torch.cdist(values_ND, values_ND)
    same = torch.tensor([[a == b for b in tasks] for a in tasks]) & ~torch.eye(len(tasks), dtype=torch.bool)
    different = torch.tensor([[a != b for b in tasks] for a in tasks])
    assert distance_NN[same].mean() < 0.8 * distance_NN[different].mean()


def test_a_stack_gives_the_same_bits_twice(tmp_path: Path) -> None:
    stack = plan_zoo(TINY_ZOO).stacks[0]
    shards = [train_stack(stack, TINY_ZOO, str(tmp_path / str(run))).shard for run in range(2)]
    assert shards[0] is not None
    assert shards[1] is not None
    assert shards[0].sha256 == shards[1].sha256


def test_diverged_networks_are_dropped_whole_and_counted(tmp_path: Path) -> None:
    plan = plan_zoo(TINY_ZOO)
    stack = next(stack for stack in plan.stacks if len(stack.trajectories) >= 4)
    tasks = [build_task(spec.task_recipe) for spec in stack.trajectories]
    states = [
        {name: tensor.repeat(len(tasks), *[1] * tensor.dim()).clone() for name, tensor in stack.start.state.items()}
        for _ in TINY_ZOO.checkpoint_steps
    ]
    first = next(iter(states[0]))
    states[0][first][1] = torch.nan  # An early checkpoint alone, the last one being sane.
    states[1][first][3] = torch.inf
    left = write_stack(stack, tasks, recorded(states), str(tmp_path))
    assert len(left.diverged) == 2
    assert left.shard is not None
    corpus = commit_corpus(
        str(tmp_path), shards=[left.shard], tasks=plan.tasks, networks=[stack.start.network], recipe={}
    )
    kept = {row["trajectory_id"].rpartition("/")[0] for row in corpus.facts.to_pylist()}
    name = stack.start.network.name
    assert kept == {f"{name}/{task.id}" for n, task in enumerate(tasks) if n not in (1, 3)}


def test_a_stack_that_diverged_altogether_leaves_no_shard(tmp_path: Path) -> None:
    stack = plan_zoo(TINY_ZOO).stacks[0]
    tasks = [build_task(spec.task_recipe) for spec in stack.trajectories]
    nothing = {name: torch.full((len(tasks), *tensor.shape), torch.nan) for name, tensor in stack.start.state.items()}
    left = write_stack(stack, tasks, recorded([nothing, nothing]), str(tmp_path))
    assert left.shard is None
    assert len(left.diverged) == len(stack.trajectories)
    assert not any(tmp_path.iterdir())
