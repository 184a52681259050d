"""Recorded facts are enough to train every trajectory again, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raywgen.corpus import BuildConfig, Corpus, CorpusError, build_corpus
from raywgen.tasks import SAMConfig
from raywgen.zoo import ZooConfig
from raywgen.zoo.config import ZooOptimizer, ZooTasks
from raywgen.zoo.replay import go_on, replay
from tests.conftest import make_zoo

COMMON: dict[str, Any] = {
    "num_validation_tasks": 0,
    "num_unseen_tasks": 0,
    "seeds_per_task": 2,
    "num_steps": 20,
    "checkpoint_steps": [0, 8, 20],
    "num_condition_samples": 8,
    "stack_size": 3,
}
ZOOS = {
    "stack-own": ZooConfig(
        **COMMON,
        networks=[[64, 5, 2]],
        num_seen_tasks=3,
        start="own",
        optimizers=[ZooOptimizer(), ZooOptimizer(optimizer="sgd", learning_rate=0.05)],
        keep_optimizer=True,
    ),
    "stack-branched": ZooConfig(
        **COMMON, networks=[[64, 5, 2]], num_seen_tasks=2, start="branched", branch_steps=10, keep_optimizer=True
    ),
    "alone-shared": ZooConfig(
        **COMMON,
        tasks=ZooTasks(kind="class-subsets", limit=200),
        networks=[{"name": "cifar-resnet", "depth": 8, "widths": [2, 3, 4], "in_channels": 1, "num_classes": 3}],
        num_seen_tasks=2,
        execution="sequential",
        augment="flip+shift-1",
        optimizers=[ZooOptimizer(optimizer="adamw", schedule="cosine", sam=SAMConfig(rho=0.05))],
        keep_optimizer=True,
    ),
}


@pytest.fixture(scope="module", params=list(ZOOS))
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_zoo(ZOOS[request.param], tmp_path_factory.mktemp("zoo") / "corpus")


def trajectories(zoo: Corpus) -> list[str]:
    rows = zoo.facts.to_pylist()
    return sorted({row["trajectory_id"] for row in rows if row["split"] not in ("base", "optimizer")})


def assert_stored(zoo: Corpus, trajectory_id: str, states: dict[int, dict[str, torch.Tensor]]) -> None:
    for step, state in states.items():
        stored = zoo.state_dict(f"{trajectory_id}/step-{step}")
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in state.items()), (trajectory_id, step)


def test_a_trajectory_is_trained_again_bit_for_bit(zoo: Corpus) -> None:
    for trajectory_id in trajectories(zoo):
        states = replay(zoo, trajectory_id)
        assert list(states) == [0, 8, 20]
        assert_stored(zoo, trajectory_id, states)


@pytest.mark.parametrize("step", [0, 8])
def test_a_trajectory_goes_on_from_any_stored_step_bit_for_bit(zoo: Corpus, step: int) -> None:
    for trajectory_id in trajectories(zoo)[:2]:
        states = go_on(zoo, trajectory_id, step)
        assert max(states) == 20
        assert_stored(zoo, trajectory_id, states)


def test_every_start_is_what_the_facts_say(zoo: Corpus) -> None:
    kind = zoo.manifest["recipe"]["zoo"]["start"]
    rows = [row for row in zoo.facts.to_pylist() if row["split"] == "train" and row["step"] == 0]
    starts = {row["checkpoint_id"]: zoo.state_dict(row["checkpoint_id"]) for row in rows}
    assert {row["start"] for row in rows} == {kind}
    first = next(iter(starts.values()))
    same = [all(torch.equal(tensor, first[name]) for name, tensor in state.items()) for state in starts.values()]
    if kind == "own":
        assert sum(same) == len({row["trajectory_id"] for row in rows if row["start_seed"] == rows[0]["start_seed"]})
        assert sum(same) < len(same)
        assert {row["base_id"] for row in rows} == {None}
    else:
        assert all(same)
        (base,) = {row["base_id"] for row in rows}
        assert all(torch.equal(tensor, first[name]) for name, tensor in zoo.state_dict(base).items())


def test_what_is_no_zoo_or_kept_no_optimiser_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "net.safetensors")
    built = build_corpus(BuildConfig(out=str(tmp_path / "b"), sources=[str(tmp_path)], distributed=False))
    with pytest.raises(CorpusError, match=r"was not made by `raywgen zoo train`"):
        replay(built, "net")
    plain = make_zoo(ZooConfig(**COMMON, networks=[[64, 4, 2]], num_seen_tasks=1), tmp_path / "c")
    with pytest.raises(CorpusError, match="holds no trajectory 'nothing'"):
        replay(plain, "nothing")
    with pytest.raises(CorpusError, match="keeps no optimiser tensors of step 8"):
        go_on(plain, trajectories(plain)[0], 8)
