"""Finds the damaged files of a corpus, and the checkpoints that are lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from raywgen.corpus.checksums import PAGE_BYTES, PAGE_SUMS, page_sums, row_sums
from raywgen.corpus.commit import commit_corpus, stored_shards
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import RESTORE, CorpusError
from raywgen.corpus.manifest import CHECKPOINTS, PAGES, read_manifest
from raywgen.corpus.shards import Shard, checkpoint_ids, packed_tensor, read_shard
from raywgen.corpus.statistics import LayoutStatistics, Statistics, add_statistics, statistics_from_json
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.writing import writing


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One damaged file, the reason, and the checkpoints that are lost."""

    file: str
    reason: str
    checkpoint_ids: tuple[str, ...]


def verify_corpus(location: str | Path, on_progress: Callable[[int, int], None] | None = None) -> list[Damage]:
    """Checks every checksum, length, layout and row count; reads all bytes once.

    Args:
        location: Path or URI.
        on_progress: Called with the number of shards checked and their total.

    Raises:
        CorpusError: There is no readable manifest.
    """
    storage = CorpusStorage.at(location)
    corpus = Corpus(storage, read_manifest(storage))
    damages = []
    for name, sha256 in corpus.manifest["sha256"].items():
        if reason := _file_damage(storage, name, sha256):
            damages.append(Damage(file=name, reason=reason, checkpoint_ids=()))
    files, damaged = corpus.manifest["files"], {damage.file for damage in damages}
    facts_are_whole, pages_are_whole = files[CHECKPOINTS] not in damaged, files.get(PAGES) not in damaged
    for done, shard in enumerate(corpus.shards, start=1):
        if reason := _file_damage(storage, shard.path, shard.sha256) or _content_damage(corpus, shard, pages_are_whole):
            lost = _lost_checkpoints(corpus, shard) if facts_are_whole else ()
            damages.append(Damage(file=shard.path, reason=reason, checkpoint_ids=lost))
        if on_progress is not None:
            on_progress(done, len(corpus.shards))
    return damages


def repair_corpus(location: str | Path, damages: Sequence[Damage]) -> Corpus:
    """Removes damaged shards from a corpus and adds their checkpoints to its quarantine; nothing else changes.

    Damaged checksums of pages are made anew. The files of the shards are not deleted, so that intact parts can still be
    rescued by hand.

    Raises:
        CorpusError: The facts themselves are damaged, or every shard is.
        InUseError: Another process writes to the corpus.
    """
    with writing(location):
        return _repair(location, damages)


def _repair(location: str | Path, damages: Sequence[Damage]) -> Corpus:
    storage = CorpusStorage.at(location)
    bad = {damage.file: damage for damage in damages}
    manifest = read_manifest(storage)
    if has_bad_pages := manifest["files"].get(PAGES) in bad:
        del bad[manifest["files"].pop(PAGES)]
    corpus = Corpus(storage, manifest)
    if facts := sorted(set(bad) & set(corpus.manifest["sha256"])):
        raise CorpusError(f"{corpus.location}/{facts[0]} {bad[facts[0]].reason}; {RESTORE}")
    shards = stored_shards(corpus)
    kept = [shard for shard in shards if shard.path not in bad]
    if not kept:
        raise CorpusError(f"{corpus.location}: every shard is damaged; {RESTORE}")
    if has_bad_pages:
        for shard in kept:
            _add_page_sums(corpus, shard)
    lost = [
        {"checkpoint_id": row["checkpoint_id"], "file": shard.path, "reason": bad[shard.path].reason}
        for shard in shards
        if shard.path in bad
        for row in shard.facts
    ]
    return commit_corpus(
        str(location),
        shards=kept,
        tasks=list(corpus.tasks.values()),
        networks=list(corpus.networks.values()),
        recipe=corpus.manifest["recipe"],
        quarantine=[*corpus.quarantine.to_pylist(), *lost],
        statistics=_statistics(corpus, kept),
        forms=corpus.forms,
    )


def _add_page_sums(corpus: Corpus, shard: Shard) -> None:
    """Adds the checksums of pages to the facts of a shard, which lie in the order of its rows."""
    form = corpus.form(shard.path)
    if form.num_bytes > PAGE_BYTES:
        packed_NP = packed_tensor(read_shard(corpus.storage, shard.path), form)
        for row in shard.facts:
            row[PAGE_SUMS] = page_sums(packed_NP[row["row"]].numpy().data).hex()


def _statistics(corpus: Corpus, kept: Sequence[Shard]) -> Statistics:
    """Returns the statistics of the kept shards; measures them again only if a layout has lost a shard."""
    kept_paths = {shard.path for shard in kept}
    touched = {shard.layout_id for shard in corpus.shards if shard.path not in kept_paths}
    known = statistics_from_json(corpus.manifest.get("statistics", {}))
    found = {key: sums for key, sums in known.items() if key[0] not in touched}
    measured = touched & {layout_id for layout_id, _ in known}
    for shard in kept:
        if shard.layout_id in measured:
            layout = corpus.form(shard.path)
            sums = LayoutStatistics.measure(layout, packed_tensor(read_shard(corpus.storage, shard.path), layout))
            sums = sums.named_as(layout, corpus.layout(layout.id))
            add_statistics(found, (layout.id, shard.facts[0]["split"]), sums)
    return found


def _file_damage(storage: CorpusStorage, path: str, sha256: str) -> str | None:
    if storage.size(path) is None:
        return "is missing"
    try:
        return None if storage.sha256(path) == sha256 else "has another checksum than the manifest says"
    except CorpusError as error:
        return f"cannot be read: {error}"


def _lost_checkpoints(corpus: Corpus, shard: Shard) -> tuple[str, ...]:
    """Returns the checkpoints whose id or weights changed; all of the shard if it cannot be read."""
    facts = corpus.select(shard=shard.path)
    written = list(zip(facts.column("checkpoint_id").to_pylist(), facts.column("sha256").to_pylist(), strict=True))
    try:
        table = read_shard(corpus.storage, shard.path)
        sums = row_sums(packed_tensor(table, corpus.form(shard.path)))
        found = set(zip(checkpoint_ids(table, corpus.form(shard.path)), sums, strict=True))
    except CorpusError:
        found = set()
    return tuple(checkpoint_id for checkpoint_id, digest in written if (checkpoint_id, digest) not in found)


def _content_damage(corpus: Corpus, shard: Shard, pages_are_whole: bool) -> str | None:
    try:
        table, form = read_shard(corpus.storage, shard.path), corpus.form(shard.path)
        packed_NP = packed_tensor(table, form)
    except (CorpusError, KeyError) as error:
        return str(error)
    if table.num_rows != shard.num_rows:
        return f"holds {table.num_rows} rows, not {shard.num_rows}"
    for checkpoint_id, row in zip(checkpoint_ids(table, form), packed_NP.numpy(), strict=True):
        written = corpus.page_sums(checkpoint_id) if pages_are_whole else None
        if written not in (None, page_sums(row.data)):
            return f"has other pages of checkpoint '{checkpoint_id}' than {PAGES} says"
    return None
