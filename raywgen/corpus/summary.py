"""Counts the content of a corpus."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow.compute

from raywgen.corpus.aside import is_refused

if TYPE_CHECKING:
    from raywgen.corpus.corpus import Corpus

# Arrow creates these functions at import, so no type checker sees them.
pc: Any = pyarrow.compute
_SHOWN_RUNS = 8
_SHOWN_OF_TOKENS = ("chunk_length", "num_levels", "num_codes")


def summary(corpus: Corpus) -> dict[str, Any]:
    """Returns the counts that `raywgen corpus info` shows."""
    facts = corpus.facts
    accuracy = facts.column("test_accuracy")
    known = accuracy.filter(pc.is_finite(accuracy))
    refused = sum(map(is_refused, corpus.quarantine.to_pylist()))
    runs = Counter(facts.column("trajectory_id").to_pylist())
    counts = {
        "location": corpus.location,
        "schema_version": corpus.manifest["schema_version"],
        "checkpoints": facts.num_rows,
        "trajectories": len(runs),
        "steps_of_trajectories": {name: count for name, count in runs.most_common(_SHOWN_RUNS) if count > 1},
        "tasks": dict(Counter(task.split for task in corpus.tasks.values())),
        "networks": {net.name: net.layout.num_values for net in corpus.networks.values()},
        "splits": dict(Counter(facts.column("split").to_pylist())),
        "starts": dict(Counter(facts.column("start").to_pylist())),
        "values": pc.sum(facts.column("num_values")).as_py() or 0,
        "dtypes": dict(Counter(facts.column("dtype").to_pylist())),
        "quarantined": refused,
        "passed_over": corpus.quarantine.num_rows - refused,
        "bytes": sum(shard.num_bytes for shard in corpus.shards),
        "shards": len(corpus.shards),
        "test_accuracy": [pc.min(known).as_py(), pc.max(known).as_py()] if len(known) else None,
        "licences": sorted(set(facts.column("licence").to_pylist())),
    }
    tokens = corpus.manifest["recipe"].get("tokens")
    return counts if tokens is None else counts | {"tokens": {key: tokens[key] for key in _SHOWN_OF_TOKENS}}
