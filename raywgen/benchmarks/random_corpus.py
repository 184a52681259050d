"""Corpora of random values, for benchmarks in which what networks do has no part."""

from __future__ import annotations

from pathlib import Path

import torch

from raywgen.corpus import CheckpointFacts, Corpus, NetworkFacts, commit_corpus, write_shard
from raywgen.weights import Layout

_ROW = 1000


def random_corpus(folder: Path, num_networks: int, num_values: int) -> Corpus:
    """Writes networks of one matrix of 1000 columns, float32, each in a shard of its own, without tasks."""
    shape = (num_values // _ROW, _ROW)
    layout = Layout.from_state_dict({"weight": torch.empty(shape)})
    shards = []
    for index in range(num_networks):
        name = f"{index:04d}"
        values = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        facts = CheckpointFacts(
            checkpoint_id=name,
            trajectory_id=name,
            task_id=None,
            layout_id=layout.id,
            step=0,
            split="train",
            start="own",
            base_id=None,
            start_seed=index,
            order_seed=0,
            optimizer="none",
            learning_rate=0.0,
            train_loss=0.0,
            test_accuracy=0.0,
            source="random",
            licence="CC0-1.0",
        )
        packed_1P = layout.pack({"weight": values}).unsqueeze(0)
        shards.append(write_shard(str(folder), name, layout, [facts], packed_1P, is_finite=True))
    network = NetworkFacts(name="random", recipe={}, layout=layout)
    return commit_corpus(str(folder), shards=shards, tasks=[], networks=[network], recipe={"benchmark": "random"})
