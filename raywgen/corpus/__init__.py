"""Corpora of checkpoints: ingest into Arrow shards, queries, streams, export."""

from typing import TYPE_CHECKING

from raywgen.lazy import lazy_names

if TYPE_CHECKING:
    from raywgen.corpus.build import BuildConfig as BuildConfig
    from raywgen.corpus.build import build_corpus as build_corpus
    from raywgen.corpus.checkpoint import Checkpoint as Checkpoint
    from raywgen.corpus.chunk_stream import ChunkBatch as ChunkBatch
    from raywgen.corpus.chunk_stream import ChunkStream as ChunkStream
    from raywgen.corpus.commit import commit_corpus as commit_corpus
    from raywgen.corpus.corpus import Corpus as Corpus
    from raywgen.corpus.errors import ChangedCorpusError as ChangedCorpusError
    from raywgen.corpus.errors import CorpusError as CorpusError
    from raywgen.corpus.errors import DamagedFileError as DamagedFileError
    from raywgen.corpus.errors import MissingFileError as MissingFileError
    from raywgen.corpus.errors import UnknownFactError as UnknownFactError
    from raywgen.corpus.facts import CheckpointFacts as CheckpointFacts
    from raywgen.corpus.facts import NetworkFacts as NetworkFacts
    from raywgen.corpus.facts import TaskFacts as TaskFacts
    from raywgen.corpus.mixed_stream import MixedStream as MixedStream
    from raywgen.corpus.order import Cursor as Cursor
    from raywgen.corpus.shards import Shard as Shard
    from raywgen.corpus.shards import checkpoint_ids as checkpoint_ids
    from raywgen.corpus.shards import packed_tensor as packed_tensor
    from raywgen.corpus.shards import write_shard as write_shard
    from raywgen.corpus.trajectory_stream import TrajectoryStream as TrajectoryStream
    from raywgen.corpus.trajectory_windows import TrajectoryBatch as TrajectoryBatch
    from raywgen.corpus.verify import Damage as Damage
    from raywgen.corpus.verify import verify_corpus as verify_corpus
    from raywgen.corpus.weights_dataset import WeightsDataset as WeightsDataset

if not TYPE_CHECKING:  # Type checkers would take any name for one that is there.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "raywgen.corpus.build": ["BuildConfig", "build_corpus"],
            "raywgen.corpus.chunk_stream": ["ChunkBatch", "ChunkStream"],
            "raywgen.corpus.commit": ["commit_corpus"],
            "raywgen.corpus.checkpoint": ["Checkpoint"],
            "raywgen.corpus.corpus": ["Corpus"],
            "raywgen.corpus.errors": [
                "ChangedCorpusError",
                "CorpusError",
                "DamagedFileError",
                "MissingFileError",
                "UnknownFactError",
            ],
            "raywgen.corpus.facts": ["CheckpointFacts", "NetworkFacts", "TaskFacts"],
            "raywgen.corpus.mixed_stream": ["MixedStream"],
            "raywgen.corpus.order": ["Cursor"],
            "raywgen.corpus.shards": ["Shard", "checkpoint_ids", "packed_tensor", "write_shard"],
            "raywgen.corpus.trajectory_stream": ["TrajectoryStream"],
            "raywgen.corpus.trajectory_windows": ["TrajectoryBatch"],
            "raywgen.corpus.verify": ["Damage", "verify_corpus"],
            "raywgen.corpus.weights_dataset": ["WeightsDataset"],
        },
    )
