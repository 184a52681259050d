"""Turns files into shards, one work item at a time; no finished item is repeated.

An item is a fixed list of checkpoints. Its shards are written first, then in one step its journal, which lists the
content of the shards and the refused checkpoints with reasons. Items with a journal are skipped; when all have one, the
corpus is committed. So an ingest may be killed at any point and run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor

from raywgen.corpus.aside import PASSED_OVER, REFUSED, SetAside
from raywgen.corpus.constants import find_constants, why_not_finite, with_nan
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import CHECKPOINT_COLUMNS, FILE_METADATA, CheckpointFacts, FactValue
from raywgen.corpus.sharded import read_weight_map
from raywgen.corpus.shards import Shard, num_pages, write_shard
from raywgen.corpus.source_tree import local_file, open_remote
from raywgen.corpus.sources import SourceCheckpoint
from raywgen.corpus.statistics import (
    LayoutStatistics,
    Statistics,
    add_statistics,
    statistics_from_json,
    statistics_to_json,
)
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.writing import JOURNALS
from raywgen.sealed import sealed_json, unseal
from raywgen.weights import Layout, WeightsError
from raywgen.weights.errors import NotWeightsError
from raywgen.weights.packed import PackedCheckpoint, pack
from raywgen.weights.reader import ReadNetworks, WeightsReader

_UNKNOWN = float("nan")
_ITEM_CHECKPOINTS = 2_000
_ITEM_BYTES = 256 << 20
_PEEK_BYTES = 64 << 20
_T = TypeVar("_T")
_DEFAULTS: dict[str, FactValue] = {
    "task_id": None,
    "step": 0,
    "split": "train",
    "start": "own",
    "base_id": None,
    "start_seed": -1,
    "order_seed": -1,
    "optimizer": "",
    "learning_rate": _UNKNOWN,
    "train_loss": _UNKNOWN,
    "test_accuracy": _UNKNOWN,
    "licence": "unknown",
    "architecture": "",
}
_DEFAULT_FACTS: dict[str, FactValue] = dict.fromkeys(CHECKPOINT_COLUMNS) | _DEFAULTS


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestItem:
    """Checkpoints that one Ray task ingests.

    Attributes:
        name: Digest of the item's content.
        checkpoints: The checkpoints to ingest.
        constants: Patterns of tensors that are stored as they are, finite or not.
    """

    name: str
    checkpoints: tuple[SourceCheckpoint, ...]
    constants: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all files."""
        return sum(checkpoint.num_bytes for checkpoint in self.checkpoints)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestResult:
    """The result of an item.

    Attributes:
        shards: Shards with the facts of their checkpoints.
        layouts: Layouts by form id.
        quarantine: One row for each entry that is not taken: `checkpoint_id`, `file`, `reason`, `kind`.
        statistics: Sums over the checkpoints of each form and split.
    """

    shards: list[Shard]
    layouts: dict[str, Layout]
    quarantine: list[dict[str, str]]
    statistics: Statistics

    def to_json(self) -> dict[str, object]:
        """Returns the content of the journal."""
        return {
            "shards": [shard.to_json() | {"facts": shard.facts} for shard in self.shards],
            "layouts": {form_id: layout.to_json() for form_id, layout in self.layouts.items()},
            "quarantine": self.quarantine,
            "statistics": statistics_to_json(self.statistics),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> IngestResult:
        """Reads what `to_json` wrote."""
        return cls(
            shards=[Shard(**row) for row in content["shards"]],
            layouts={form_id: Layout.from_json(rows) for form_id, rows in content["layouts"].items()},
            quarantine=content["quarantine"],
            statistics=statistics_from_json(content["statistics"]),
        )


def plan_items(checkpoints: Sequence[SourceCheckpoint], constants: Sequence[str] = ()) -> list[IngestItem]:
    """Cuts a list of checkpoints into items; the same list gives the same items."""
    items: list[IngestItem] = []
    part: list[SourceCheckpoint] = []
    size = 0
    for checkpoint in checkpoints:
        if part and (len(part) == _ITEM_CHECKPOINTS or size + checkpoint.num_bytes > _ITEM_BYTES):
            items.append(_item(part, constants))
            part, size = [], 0
        part.append(checkpoint)
        size += checkpoint.num_bytes
    return [*items, _item(part, constants)] if part else items


def _item(checkpoints: list[SourceCheckpoint], constants: Sequence[str]) -> IngestItem:
    # The name includes facts and times of change: an item with other ones must be ingested again.
    rows = [[c.name, c.files, c.num_bytes, c.changed, c.select, c.facts] for c in checkpoints]
    content = json.dumps(rows, sort_keys=True, default=str)
    content += json.dumps(list(constants)) if constants else ""
    return IngestItem(
        name=hashlib.sha256(content.encode()).hexdigest()[:16],
        checkpoints=tuple(checkpoints),
        constants=tuple(constants),
    )


def journal(item_name: str) -> str:
    """Returns the path of an item's journal in the corpus."""
    return f"{JOURNALS}/{item_name}.json"


def read_journal(storage: CorpusStorage, item_name: str) -> IngestResult:
    """Reads the result of an item from its journal.

    Raises:
        CorpusError: The journal is damaged.
    """
    try:
        return IngestResult.from_json(unseal(storage.read(journal(item_name))))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(
            f"{storage.name}/{journal(item_name)} is damaged; delete it and run the same command"
        ) from error


def ingest_item(item: IngestItem, root: str) -> dict[str, int]:
    """Reads an item's files, writes its shards, then its journal.

    Returns:
        Counts for progress: `checkpoints`, `quarantined`, `num_bytes`.

    Raises:
        CorpusError: A shard cannot be written.
    """
    torch.set_num_threads(1)
    storage = CorpusStorage.at(root)
    done = _Ingest(item, root).run()
    storage.write(journal(item.name), sealed_json(done.to_json()).encode())
    kept = sum(len(shard.facts) for shard in done.shards)
    return {"checkpoints": kept, "quarantined": len(done.quarantine), "num_bytes": item.num_bytes}


class _Ingest:
    """The ingest of one item: checkpoints are gathered by layout and split until the item is read."""

    def __init__(self, item: IngestItem, root: str) -> None:
        self._item = item
        self._root = root
        self._waiting: dict[tuple[str, str], list[tuple[SourceCheckpoint, PackedCheckpoint]]] = {}
        self._done = IngestResult(shards=[], layouts={}, quarantine=[], statistics={})

    def run(self) -> IngestResult:
        reader = _CheckpointReader()
        for checkpoint in self._item.checkpoints:
            try:
                found = reader.read(checkpoint)
            except NotWeightsError as error:
                self._set_aside(checkpoint, str(error), PASSED_OVER)
                continue
            except (WeightsError, CorpusError) as error:
                self._set_aside(checkpoint, str(error))
                continue
            for name, packed in found.networks:
                inside = replace(checkpoint, name=f"{checkpoint.name}:{name}") if name else checkpoint
                self._add(inside, packed)
            if found.others:
                keys = ", ".join(f"'{key}'" for key in found.others)
                self._set_aside(checkpoint, f"also holds {keys}; `--select KEY` takes them instead", PASSED_OVER)
        for key in list(self._waiting):
            self._flush(key)
        return self._done

    def _add(self, checkpoint: SourceCheckpoint, packed: PackedCheckpoint) -> None:
        checkpoint = _with_metadata(checkpoint, packed.metadata)
        key = (packed.layout.form_id, str(checkpoint.facts.get("split", _DEFAULTS["split"])))
        if key in self._waiting:
            self._waiting[key].append((checkpoint, packed))
            return
        self._waiting[key] = [(checkpoint, packed)]
        if num_pages(packed.layout) > 1:
            self._flush(key)

    def _set_aside(self, checkpoint: SourceCheckpoint, reason: str, kind: str = REFUSED) -> None:
        file = checkpoint.index or checkpoint.files[0]
        row = SetAside(checkpoint_id=checkpoint.name, file=file, reason=reason, kind=kind)
        self._done.quarantine.append(row.to_row())

    def _flush(self, key: tuple[str, str]) -> None:
        rows = self._waiting.pop(key)
        layout = rows[0][1].layout
        packed_NP = _stack([packed.packed_P for _, packed in rows])
        statistics = LayoutStatistics.measure(layout, packed_NP)
        if constants := find_constants(layout, packed_NP, statistics, self._item.constants):
            layout = layout.with_constants(constants)
            statistics = LayoutStatistics.measure(layout, packed_NP)
        if bad := with_nan(layout, packed_NP, constants) | statistics.non_finite(layout, packed_NP):
            for index, tensor in bad.items():
                self._set_aside(rows[index][0], why_not_finite(layout, tensor, packed_NP[index]))
            kept = [index for index in range(len(rows)) if index not in bad]
            if not kept:
                return
            rows, packed_NP = [rows[index] for index in kept], packed_NP[kept]
            statistics = LayoutStatistics.measure(layout, packed_NP)
        facts = [_facts(checkpoint, packed) for checkpoint, packed in rows]
        name = f"{self._item.name}-{len(self._done.shards):03d}"
        self._done.shards.append(write_shard(self._root, name, layout, facts, packed_NP, is_finite=True))
        earlier = self._done.layouts.get(layout.form_id, layout)
        marked = {spec.name for spec in earlier.tensors if spec.is_constant}
        self._done.layouts[layout.form_id] = layout.with_constants(marked)
        add_statistics(self._done.statistics, key, statistics)


def _stack(parts: list[np.ndarray]) -> Tensor:
    if len(parts) == 1:
        return torch.from_numpy(parts[0]).unsqueeze(0)
    return torch.from_numpy(np.stack(parts))


class _CheckpointReader:
    """Reads checkpoints from all kinds of sources; corpora stay open."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, ...], WeightsReader] = {}
        self._corpora: dict[str, tuple[Corpus, dict[str, int]]] = {}

    def read(self, checkpoint: SourceCheckpoint) -> ReadNetworks:
        if checkpoint.stored_id is not None:
            return ReadNetworks(((None, self._stored(checkpoint.files[0], checkpoint.stored_id)),))
        files = self._files.setdefault(checkpoint.select, WeightsReader(checkpoint.select))
        if checkpoint.index is not None:
            return ReadNetworks(((None, self._sharded(checkpoint, checkpoint.index, files)),))
        peek = files.peek if checkpoint.num_bytes >= _PEEK_BYTES else None
        return self._fetched(checkpoint.files[0], files.read_all, peek)

    def _fetched(self, file: str, read: Callable[[str], _T], peek: Callable[[BinaryIO, str], None] | None = None) -> _T:
        """Reads a local file, or a copy of a remote one; errors name the file, not the copy."""
        if peek is not None and "://" in file:
            # A large file that turns out to be an optimizer's state must not be copied first.
            with open_remote(file) as opened:
                peek(opened, file)
        with local_file(file) as path:
            try:
                return read(path)
            except WeightsError as error:
                if path == file:
                    raise
                raise type(error)(str(error).replace(path, file)) from error

    def _sharded(self, checkpoint: SourceCheckpoint, index: str, files: WeightsReader) -> PackedCheckpoint:
        """Reads a network from several files, each tensor from the file that the index names."""
        wanted = read_weight_map(index)
        names = list(dict.fromkeys(wanted.values()))
        if len(names) != len(checkpoint.files):
            raise WeightsError(f"{index} has changed while it was ingested; build again")
        state: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for name, file in zip(names, checkpoint.files, strict=True):
            part = self._fetched(file, files.read)
            values = part.layout.unpack(torch.from_numpy(part.packed_P))
            found = {part.prefix + tensor: value for tensor, value in values.items()}
            expected = {tensor for tensor, place in wanted.items() if place == name}
            if lacking := sorted(expected - found.keys()):
                raise WeightsError(f"{file} lacks tensor '{lacking[0]}', which {index} places there; fetch both again")
            if extra := sorted(found.keys() - expected):
                where = "in another file" if extra[0] in wanted else "nowhere"
                raise WeightsError(f"{file} holds tensor '{extra[0]}', which {index} places {where}; fetch both again")
            state |= found
            metadata |= part.metadata
        return replace(pack(state, index), metadata=metadata)

    def _stored(self, location: str, stored_id: str) -> PackedCheckpoint:
        if location not in self._corpora:
            corpus = Corpus.open(location)
            ids = corpus.facts.column("checkpoint_id").to_pylist()
            self._corpora[location] = corpus, {name: index for index, name in enumerate(ids)}
        corpus, rows = self._corpora[location]
        row = corpus.facts.slice(rows[stored_id], 1)
        packed_1P = corpus.packed(row)
        return PackedCheckpoint(
            corpus.form(row.column("shard")[0].as_py()), packed_1P[0].numpy(), row.column("key_prefix")[0].as_py() or ""
        )


def _with_metadata(checkpoint: SourceCheckpoint, metadata: Mapping[str, str]) -> SourceCheckpoint:
    if not metadata or metadata == {"format": "pt"}:
        return checkpoint
    return replace(checkpoint, facts=checkpoint.facts | {FILE_METADATA: json.dumps(dict(metadata), sort_keys=True)})


def _facts(checkpoint: SourceCheckpoint, packed: PackedCheckpoint) -> CheckpointFacts:
    given = {"trajectory_id": checkpoint.name, "source": checkpoint.files[0]} | checkpoint.facts
    known: dict[str, Any] = _DEFAULT_FACTS | {name: value for name, value in given.items() if name in _DEFAULT_FACTS}
    known |= {"checkpoint_id": checkpoint.name, "layout_id": packed.layout.id, "key_prefix": packed.prefix}
    more = {name: value for name, value in given.items() if name not in _DEFAULT_FACTS}
    return CheckpointFacts(**known, more=more)
