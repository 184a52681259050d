"""A corpus: checkpoints at rest, Arrow shards plus a manifest.

On disk: `manifest.json`, `checkpoints.parquet` and `tasks.parquet` (facts), `weights/NAME.arrow` (shards). The
manifest is written last and in one step: a folder without one is no corpus, so a reader never sees half of it.

Shape legend: N checkpoints, D values of the flat vector, P packed bytes.
"""

from __future__ import annotations

import difflib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError, MissingFileError, UnknownFactError
from raywgen.corpus.facts import CHECKPOINT_SCHEMA, NetworkFacts, TaskFacts, tasks_from_table, tasks_to_table
from raywgen.corpus.shards import Shard, packed_tensor, read_shard
from raywgen.corpus.storage import Storage
from raywgen.weights import Layout, StateDict

if TYPE_CHECKING:
    import ray.data

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_CHECKPOINTS = "checkpoints.parquet"
_TASKS = "tasks.parquet"


class Corpus:
    """An opened corpus; get one by `Corpus.open`."""

    def __init__(self, storage: Storage, manifest: dict[str, Any]) -> None:
        self.storage = storage
        self.manifest = manifest
        self.shards = [Shard(**row) for row in manifest["shards"]]
        self.networks: dict[str, NetworkFacts] = {}
        for row in manifest["networks"]:
            network = NetworkFacts.from_json(row)
            self.networks[network.layout.id] = network

    @classmethod
    def open(cls, location: str | Path) -> Self:
        """Reads the manifest and checks that every file is there in full length.

        Raises:
            MissingFileError: There is no corpus, or a file of it is missing.
            DamagedFileError: The manifest cannot be read, or a shard is truncated.
            CorpusError: The corpus has another schema version.
        """
        storage = Storage.at(location)
        manifest = _read_manifest(storage)
        corpus = cls(storage, manifest)
        for shard in corpus.shards:
            size = storage.size(shard.path)
            if size is None:
                raise MissingFileError(f"{storage.name}/{shard.path} is missing; {RESTORE}")
            if size != shard.num_bytes:
                raise DamagedFileError(
                    f"{storage.name}/{shard.path} has {size} bytes, the manifest says {shard.num_bytes}; {RESTORE}"
                )
        return corpus

    @property
    def location(self) -> str:
        """Path or URI, as it was opened."""
        return self.storage.name

    @cached_property
    def facts(self) -> pa.Table:
        """One row a checkpoint."""
        return self._read_facts(_CHECKPOINTS)

    @cached_property
    def tasks(self) -> dict[str, TaskFacts]:
        """Task id -> task."""
        return tasks_from_table(self._read_facts(_TASKS))

    def layout(self, layout_id: str) -> Layout:
        """The layout of that id."""
        return self.networks[layout_id].layout

    def select(self, **equals: Any) -> pa.Table:
        """Facts of the checkpoints with these values; a list or tuple means any of them.

        Raises:
            UnknownFactError: Checkpoints have no such fact; the nearest is named.
        """
        mask = None
        for name, wanted in equals.items():
            if name not in self.facts.column_names:
                near = difflib.get_close_matches(name, self.facts.column_names, n=1, cutoff=0.0)[0]
                raise UnknownFactError(f"unknown fact '{name}'; did you mean '{near}'?")
            column = self.facts.column(name)
            values = wanted if isinstance(wanted, list | tuple) else [wanted]
            hit = pc.is_in(column, value_set=pa.array(values, column.type))
            mask = hit if mask is None else pc.and_(mask, hit)
        return self.facts if mask is None else self.facts.filter(mask)

    def packed(self, facts: pa.Table) -> Tensor:
        """Packed weights uint8 `(N, P)` of checkpoints of one layout, in the table's order."""
        layout_ids = set(facts.column("layout_id").to_pylist())
        assert len(layout_ids) == 1, f"checkpoints of {len(layout_ids)} layouts do not fit one tensor"
        layout = self.layout(layout_ids.pop())
        shards, rows = facts.column("shard").to_pylist(), facts.column("row").to_numpy()
        out_NP = torch.empty(facts.num_rows, layout.num_bytes, dtype=torch.uint8)
        for path in dict.fromkeys(shards):
            wanted = [index for index, shard in enumerate(shards) if shard == path]
            table = read_shard(self.storage, path).take(pa.array(rows[wanted]))
            out_NP[wanted] = packed_tensor(table.combine_chunks(), layout)
        return out_NP

    def values(self, facts: pa.Table) -> Tensor:
        """Flat vectors float32 `(N, D)` of checkpoints of one layout, in the table's order."""
        packed_NP = self.packed(facts)
        return self.layout(facts.column("layout_id")[0].as_py()).values(packed_NP)

    def state_dict(self, checkpoint_id: str) -> StateDict:
        """One checkpoint, bit for bit.

        Raises:
            UnknownFactError: The corpus does not hold it.
        """
        facts = self.select(checkpoint_id=checkpoint_id)
        if facts.num_rows != 1:
            raise UnknownFactError(f"{self.location} holds no checkpoint '{checkpoint_id}'; see its facts")
        return self.layout(facts.column("layout_id")[0].as_py()).unpack(self.packed(facts)[0])

    def base_values(self, layout_id: str) -> Tensor | None:
        """The shared start `(D,)` of a layout's networks, or None where each starts on its own."""
        facts = self.select(layout_id=layout_id, split="base")
        return self.values(facts)[0] if facts.num_rows == 1 else None

    def stream(self, splits: Sequence[str]) -> ray.data.Dataset:
        """A Ray Data stream of whole record batches; see `raywgen.corpus.stream`."""
        from raywgen.corpus.stream import stream

        return stream(self, splits)

    def info(self) -> dict[str, Any]:
        """Counts for people and scripts."""
        facts = self.facts
        accuracy = facts.column("test_accuracy")
        known = accuracy.filter(pc.is_finite(accuracy))
        return {
            "location": self.location,
            "schema_version": self.manifest["schema_version"],
            "checkpoints": facts.num_rows,
            "trajectories": pc.count_distinct(facts.column("trajectory_id")).as_py(),
            "tasks": dict(Counter(task.split for task in self.tasks.values())),
            "networks": {net.name: net.layout.num_values for net in self.networks.values()},
            "splits": dict(Counter(facts.column("split").to_pylist())),
            "starts": dict(Counter(facts.column("start").to_pylist())),
            "values": pc.sum(facts.column("num_values")).as_py() or 0,
            "bytes": sum(shard.num_bytes for shard in self.shards),
            "shards": len(self.shards),
            "test_accuracy": [pc.min(known).as_py(), pc.max(known).as_py()] if len(known) else None,
            "licences": sorted(set(facts.column("licence").to_pylist())),
        }

    def _read_facts(self, name: str) -> pa.Table:
        if self.storage.sha256(name) != self.manifest["sha256"][name]:
            raise DamagedFileError(f"{self.location}/{name} has another checksum than the manifest says; {RESTORE}")
        return pq.read_table(pa.BufferReader(self.storage.read(name)))


def commit_corpus(
    root: str,
    *,
    shards: Sequence[Shard],
    tasks: Sequence[TaskFacts],
    networks: Sequence[NetworkFacts],
    recipe: Mapping[str, Any],
) -> Corpus:
    """Makes written shards a corpus: facts to Parquet, then the manifest in one step.

    Raises:
        CorpusError: Checkpoint ids are not unique, or a file cannot be written.
    """
    storage = Storage.at(root)
    rows = [row for shard in shards for row in shard.facts]
    counts = Counter(row["checkpoint_id"] for row in rows)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise CorpusError(f"{root}: checkpoint id '{doubled[0]}' is there twice; give each its own")
    sums = {
        _CHECKPOINTS: _write_parquet(storage, _CHECKPOINTS, pa.Table.from_pylist(rows, schema=CHECKPOINT_SCHEMA)),
        _TASKS: _write_parquet(storage, _TASKS, tasks_to_table(tasks)),
    }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "recipe": dict(recipe),
        "networks": [network.to_json() for network in networks],
        "shards": [shard.to_json() for shard in shards],
        "sha256": sums,
    }
    storage.write(MANIFEST, json.dumps(manifest, indent=1).encode())
    return Corpus.open(root)


def _write_parquet(storage: Storage, name: str, table: pa.Table) -> str:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return storage.write(name, buffer.getvalue())


def _read_manifest(storage: Storage) -> dict[str, Any]:
    if storage.size(MANIFEST) is None:
        raise MissingFileError(f"{storage.name} holds no {MANIFEST}: it is no corpus; make one by `raywgen zoo train`")
    try:
        manifest = json.loads(storage.read(MANIFEST))
        version = manifest["schema_version"]
        missing = {"recipe", "networks", "shards", "sha256"} - set(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{storage.name}/{MANIFEST} is damaged ({error}); {RESTORE}") from error
    if version != SCHEMA_VERSION:
        raise CorpusError(
            f"{storage.name} has corpus schema {version}, this version reads {SCHEMA_VERSION}; "
            "use the version of raywgen that wrote it"
        )
    if missing:
        raise DamagedFileError(f"{storage.name}/{MANIFEST} lacks {sorted(missing)}; {RESTORE}")
    return manifest
