"""Corpora of random values, for benchmarks in which what networks do has no part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raywgen.corpus import CheckpointFacts, Corpus, NetworkFacts, commit_corpus, write_shard
from raywgen.weights import Layout


def random_corpus(folder: Path, num_networks: int, shape: tuple[int, ...]) -> Corpus:
    """Writes networks of one float32 tensor of the given shape, each in a shard of its own, without tasks."""
    layout = Layout.from_state_dict({"weight": torch.empty(shape)})
    shards = []
    for index in range(num_networks):
        name = f"{index:04d}"
        values = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        packed_1P = layout.pack({"weight": values}).unsqueeze(0)
        facts = [random_facts(name, layout, start_seed=index)]
        shards.append(write_shard(str(folder), name, layout, facts, packed_1P, is_finite=True))
    network = NetworkFacts(name="random", recipe={}, layout=layout)
    return commit_corpus(str(folder), shards=shards, tasks=[], networks=[network], recipe={"benchmark": "random"})


def random_facts(name: str, layout: Layout, **changes: Any) -> CheckpointFacts:
    """Returns the facts of a network that nothing trained, but for those that are given."""
    facts: dict[str, Any] = {
        "checkpoint_id": name,
        "trajectory_id": name,
        "task_id": None,
        "layout_id": layout.id,
        "step": 0,
        "split": "train",
        "start": "own",
        "base_id": None,
        "start_seed": 0,
        "order_seed": 0,
        "optimizer": "none",
        "learning_rate": 0.0,
        "train_loss": 0.0,
        "test_accuracy": 0.0,
        "source": "random",
        "licence": "CC0-1.0",
    }
    return CheckpointFacts(**facts | changes)
