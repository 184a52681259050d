"""Commits written shards as a corpus: facts first, the manifest last."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from raywgen.corpus.aside import REFUSED
from raywgen.corpus.checksums import PAGE_SUMS
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import (
    CHECKPOINT_SCHEMA,
    PAGES_SCHEMA,
    QUARANTINE_SCHEMA,
    FactValue,
    NetworkFacts,
    TaskFacts,
    facts_table,
    tasks_to_table,
)
from raywgen.corpus.manifest import CHECKPOINTS, MANIFEST, PAGES, QUARANTINE, SCHEMA_VERSION, TASKS
from raywgen.corpus.shards import Shard
from raywgen.corpus.statistics import Statistics, statistics_to_json
from raywgen.corpus.storage import CorpusStorage
from raywgen.sealed import sealed_json
from raywgen.weights import Layout


def commit_corpus(
    root: str,
    *,
    shards: Sequence[Shard],
    tasks: Sequence[TaskFacts],
    networks: Sequence[NetworkFacts],
    recipe: Mapping[str, object],
    quarantine: Sequence[Mapping[str, str]] = (),
    statistics: Statistics | None = None,
    forms: Mapping[str, Layout] | None = None,
) -> Corpus:
    """Commits written shards as a corpus: writes facts to Parquet, then the manifest in one step.

    Args:
        root: Path or URI of the corpus.
        shards: Shards with the facts of their checkpoints.
        tasks: Tasks that networks were trained for.
        networks: One network per layout.
        recipe: A description of how the corpus was made.
        quarantine: Entries that were not taken: `checkpoint_id`, `file`, `reason`, and `kind` (see `SetAside`).
        statistics: Sums over the checkpoints of each layout and split.
        forms: By form id, the forms of shards that differ from their network's layout.

    Raises:
        CorpusError: Checkpoint ids are not unique, or a file cannot be written; an earlier corpus stays as it was.
    """
    storage = CorpusStorage.at(root)
    own = {network.layout.form_id for network in networks}
    shards = [replace(shard, form_id="") if shard.form_id in own else shard for shard in shards]
    all_rows = [row for shard in shards for row in shard.facts]
    rows = [{name: value for name, value in row.items() if name != PAGE_SUMS} for row in all_rows]
    counts = Counter(row["checkpoint_id"] for row in rows)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise CorpusError(f"{root}: checkpoint id '{doubled[0]}' is there twice; give each its own")
    facts = {
        CHECKPOINTS: _parquet(facts_table(rows)),
        TASKS: _parquet(tasks_to_table(tasks)),
    }
    if page_sums := {row["checkpoint_id"]: bytes.fromhex(row[PAGE_SUMS]) for row in all_rows if PAGE_SUMS in row}:
        columns = [list(page_sums), list(page_sums.values())]
        facts[PAGES] = _parquet(pa.table(columns, schema=PAGES_SCHEMA))
    if quarantine:
        facts[QUARANTINE] = _parquet(
            pa.Table.from_pylist([{"kind": REFUSED, **row} for row in quarantine], QUARANTINE_SCHEMA)
        )
    files = {name: _file_name(name, content, storage) for name, content in facts.items()}
    contents = {files[name]: content for name, content in facts.items()}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "recipe": dict(recipe),
        "networks": [network.to_json() for network in networks],
        "forms": {key: (forms or {})[key].to_json() for key in sorted({shard.form_id for shard in shards} - {""})},
        "shards": [shard.to_json() for shard in shards],
        "statistics": statistics_to_json(statistics or {}),
        "files": files,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    storage.write_all({**contents, MANIFEST: sealed_json(manifest, indent=1).encode()})
    return Corpus.open(root)


def stored_shards(corpus: Corpus, **columns: Sequence[FactValue]) -> list[Shard]:
    """Returns a corpus' shards with their facts as `commit_corpus` takes them.

    Args:
        corpus: The corpus, whose shards do not change.
        columns: Facts to replace, each with one value for each row of `corpus.facts`.
    """
    rows: dict[str, list[dict[str, FactValue]]] = {}
    for index, row in enumerate(corpus.facts.to_pylist()):
        known = {name: value for name, value in row.items() if value is not None}
        known |= {name: values[index] for name, values in columns.items()}
        if (page_sums := corpus.page_sums(row["checkpoint_id"])) is not None:
            known[PAGE_SUMS] = page_sums.hex()
        complete = {name: known.get(name) for name in CHECKPOINT_SCHEMA.names} | known
        rows.setdefault(row["shard"], []).append(complete)
    return [replace(shard, facts=rows[shard.path], form_id=corpus.form(shard.path).form_id) for shard in corpus.shards]


def _file_name(name: str, content: bytes, storage: CorpusStorage) -> str:
    """Names a file of facts; a new name if a corpus exists, which stays whole until its manifest is replaced."""
    if storage.size(MANIFEST) is None:
        return name
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}.{suffix}"


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
