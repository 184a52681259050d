"""Chooses where a run's batches are read: from mapped shards, or by reader actors out of an object store."""

from __future__ import annotations

import sys
from dataclasses import replace

from raywgen.corpus.storage import CorpusStorage
from raywgen.training.config import TrainConfig


def with_source(config: TrainConfig) -> TrainConfig:
    """Returns the config of a run with `mapped` or `ray` in place of `source=auto`.

    Files of a local or shared file system are mapped; of others, one line says what is chosen, and why.

    Raises:
        CorpusError: The corpus is at a URI of an unknown kind.
    """
    if config.source != "auto":
        return config
    if CorpusStorage.at(config.corpus).is_local:
        return replace(config, source="mapped")
    if config.max_workers:
        chosen, text = "ray", "through Ray Data (source=ray): shards on an object store cannot be mapped"
    else:
        chosen, text = "mapped", "from copies on this machine (source=mapped): num_workers=0 has no readers"
    print(f"{config.out} reads {config.corpus} {text}", file=sys.stderr, flush=True)
    return replace(config, source=chosen)
