"""Small corpora of seeded random weights, shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raywgen.corpus import CheckpointFacts, Corpus, NetworkFacts, Shard, TaskFacts, commit_corpus, write_shard
from raywgen.weights import Layout, StateDict


def facts(checkpoint_id: str, layout: Layout, *, split: str = "train", step: int = 100) -> CheckpointFacts:
    return CheckpointFacts(
        checkpoint_id=checkpoint_id,
        trajectory_id=f"{checkpoint_id}/run",
        task_id=None if split == "base" else "task/1",
        layout_id=layout.id,
        step=step,
        split=split,
        start="shared",
        base_id=None,
        start_seed=1,
        order_seed=2,
        optimizer="adam",
        learning_rate=1e-3,
        train_loss=0.5,
        test_accuracy=float("nan") if split == "base" else 0.9,
        source="test",
        licence="CC0-1.0",
    )


def network(width: int, seed: int) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "0.weight": torch.randn(width, 3, generator=generator),
        "0.bias": torch.randn(width, generator=generator),
        "count": torch.tensor(seed),
    }


def shard(root: Path | str, name: str, states: Mapping[str, StateDict], split: str = "train") -> Shard:
    layout = Layout.from_state_dict(next(iter(states.values())))
    packed_NP = torch.stack([layout.pack(state) for state in states.values()])
    rows = [facts(checkpoint_id, layout, split=split, step=i) for i, checkpoint_id in enumerate(states)]
    return write_shard(str(root), name, layout, rows, packed_NP)


def task(task_id: str = "task/1") -> TaskFacts:
    generator = torch.Generator().manual_seed(3)
    return TaskFacts(
        task_id=task_id,
        instruction="Is it?",
        split="seen",
        recipe={"name": "digits-subset", "labels": [1, 4]},
        samples_SF=torch.rand(6, 4, generator=generator),
        labels_S=torch.tensor([0, 1, 1, 0, 1, 0]),
    )


def commit(root: Path | str, shards: Sequence[Shard], layouts: Sequence[Layout], seed: int = 0) -> Corpus:
    networks = [NetworkFacts(name=f"net{i}", recipe={"i": i}, layout=layout) for i, layout in enumerate(layouts)]
    return commit_corpus(str(root), shards=shards, tasks=[task()], networks=networks, recipe={"seed": seed})


def states(prefix: str, num: int, width: int, first_seed: int) -> dict[str, StateDict]:
    return {f"{prefix}{i}": network(width, first_seed + i) for i in range(num)}


def small_corpus(root: Path | str, num_narrow: int = 600) -> tuple[Corpus, dict[str, StateDict]]:
    """Two layouts; splits train (`num_narrow` + 3 checkpoints), heldout (4) and base (1)."""
    narrow, wide = states("narrow", num_narrow, 2, 0), states("wide", 3, 5, 1000)
    held, base = states("held", 4, 2, 2000), states("base", 1, 2, 3000)
    shards = [
        shard(root, "a-narrow", narrow),
        shard(root, "b-wide", wide),
        shard(root, "c-held", held, split="heldout"),
        shard(root, "d-base", base, split="base"),
    ]
    layouts = [Layout.from_state_dict(network(width, 0)) for width in (2, 5)]
    return commit(root, shards, layouts), narrow | wide | held | base


def assert_same_bits(left: StateDict, right: StateDict) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        # As bytes, so that -0.0 differs from 0.0.
        assert torch.equal(_bits(tensor), _bits(other)), name


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
