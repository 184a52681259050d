"""Corpora of checkpoints: ingest into Arrow shards, queries, streams, export."""

from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.chunk_stream import ChunkBatch, ChunkStream
from raywgen.corpus.commit import commit_corpus
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import ChangedCorpusError, CorpusError, DamagedFileError, MissingFileError, UnknownFactError
from raywgen.corpus.facts import CheckpointFacts, NetworkFacts, TaskFacts
from raywgen.corpus.mixed_stream import MixedStream
from raywgen.corpus.order import Cursor
from raywgen.corpus.shards import Shard, checkpoint_ids, packed_tensor, write_shard
from raywgen.corpus.trajectory_stream import TrajectoryStream
from raywgen.corpus.trajectory_windows import TrajectoryBatch
from raywgen.corpus.verify import Damage, verify_corpus

__all__ = [
    "BuildConfig",
    "ChangedCorpusError",
    "CheckpointFacts",
    "ChunkBatch",
    "ChunkStream",
    "Corpus",
    "CorpusError",
    "Cursor",
    "Damage",
    "DamagedFileError",
    "MissingFileError",
    "MixedStream",
    "NetworkFacts",
    "Shard",
    "TaskFacts",
    "TrajectoryBatch",
    "TrajectoryStream",
    "UnknownFactError",
    "build_corpus",
    "checkpoint_ids",
    "commit_corpus",
    "packed_tensor",
    "verify_corpus",
    "write_shard",
]
