"""Checkpoints in and out of Arrow, Ray Data streams."""

from raywgen.corpus.corpus import Corpus, commit_corpus
from raywgen.corpus.errors import CorpusError, DamagedFileError, MissingFileError, UnknownFactError
from raywgen.corpus.facts import CheckpointFacts, NetworkFacts, TaskFacts
from raywgen.corpus.shards import Shard, checkpoint_ids, packed_tensor, write_shard
from raywgen.corpus.verify import Damage, verify_corpus

__all__ = [
    "CheckpointFacts",
    "Corpus",
    "CorpusError",
    "Damage",
    "DamagedFileError",
    "MissingFileError",
    "NetworkFacts",
    "Shard",
    "TaskFacts",
    "UnknownFactError",
    "checkpoint_ids",
    "commit_corpus",
    "packed_tensor",
    "verify_corpus",
    "write_shard",
]
