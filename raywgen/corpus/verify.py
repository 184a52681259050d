"""Finds what is damaged in a corpus, and which checkpoints that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raywgen.corpus.corpus import CHECKPOINTS, Corpus, read_manifest
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.shards import Shard, packed_tensor, read_shard, row_sums
from raywgen.corpus.storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One damaged file: what is wrong, and the checkpoints that are lost by it."""

    file: str
    reason: str
    checkpoint_ids: tuple[str, ...]


def verify_corpus(location: str | Path, on_progress: Callable[[int, int], None] | None = None) -> list[Damage]:
    """Checks every checksum, length, layout and row count; reads all bytes once.

    Args:
        location: Path or URI.
        on_progress: Called with the shards checked and their number.

    Raises:
        CorpusError: There is no readable manifest, so nothing can be checked.
    """
    storage = Storage.at(location)
    corpus = Corpus(storage, read_manifest(storage))
    damages = []
    for name, sha256 in corpus.manifest["sha256"].items():
        if reason := _file_damage(storage, name, sha256):
            damages.append(Damage(file=name, reason=reason, checkpoint_ids=()))
    facts_are_whole = all(damage.file != CHECKPOINTS for damage in damages)
    for done, shard in enumerate(corpus.shards, start=1):
        if reason := _file_damage(storage, shard.path, shard.sha256) or _content_damage(corpus, shard):
            lost = _lost_checkpoints(corpus, shard) if facts_are_whole else ()
            damages.append(Damage(file=shard.path, reason=reason, checkpoint_ids=lost))
        if on_progress is not None:
            on_progress(done, len(corpus.shards))
    return damages


def _file_damage(storage: Storage, path: str, sha256: str) -> str | None:
    if storage.size(path) is None:
        return "is missing"
    try:
        return None if storage.sha256(path) == sha256 else "has another checksum than the manifest says"
    except CorpusError as error:
        return f"cannot be read: {error}"


def _lost_checkpoints(corpus: Corpus, shard: Shard) -> tuple[str, ...]:
    """The checkpoints whose id or weights are changed; all of the shard's where it cannot be read."""
    facts = corpus.select(shard=shard.path)
    written = list(zip(facts.column("checkpoint_id").to_pylist(), facts.column("sha256").to_pylist(), strict=True))
    try:
        table = read_shard(corpus.storage, shard.path)
        sums = row_sums(packed_tensor(table, corpus.layout(shard.layout_id)))
        found = set(zip(table.column("checkpoint_id").to_pylist(), sums, strict=True))
    except CorpusError:
        found = set()
    return tuple(checkpoint_id for checkpoint_id, digest in written if (checkpoint_id, digest) not in found)


def _content_damage(corpus: Corpus, shard: Shard) -> str | None:
    try:
        table = read_shard(corpus.storage, shard.path)
        packed_tensor(table, corpus.layout(shard.layout_id))
    except (CorpusError, KeyError) as error:
        return str(error)
    return None if table.num_rows == shard.num_rows else f"holds {table.num_rows} rows, not {shard.num_rows}"
