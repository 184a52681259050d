"""A corpus: checkpoints at rest, Arrow shards plus a manifest.

On disk: `manifest.json`, `checkpoints.parquet` and `tasks.parquet` (facts), `weights/NAME.arrow` (shards).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raywgen.corpus.checkpoint import Checkpoint
from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError, MissingFileError, UnknownFactError
from raywgen.corpus.facts import PAGES_SCHEMA, QUARANTINE_SCHEMA, TaskFacts, tasks_from_table
from raywgen.corpus.manifest import (
    CHECKPOINTS,
    MANIFEST,
    PAGES,
    QUARANTINE,
    TASKS,
    Contents,
    cause,
    check_shards,
    read_facts,
    read_manifest,
    rebuilt,
    with_source,
)
from raywgen.corpus.query import filter_facts, select_facts
from raywgen.corpus.shard_reader import ShardReader
from raywgen.corpus.shards import Shard, WeightsView
from raywgen.corpus.statistics import LayoutStatistics
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.summary import summary
from raywgen.sealed import checksum
from raywgen.weights import Layout, StateDict

if TYPE_CHECKING:
    import ray.data

    from raywgen.corpus.chunk_stream import ChunkStream
    from raywgen.corpus.trajectory_stream import TrajectoryStream

# Converting facts costs more per call than per row.
_FACTS_PER_BLOCK = 256


class Corpus:
    """An opened corpus: a sequence of checkpoints, and tables of facts about them.

    Examples:
        >>> corpus = raywgen.Corpus.open("runs/zoo/corpus")
        >>> len(corpus)
        154
        >>> corpus[0]
        Checkpoint('mlp-64-6-2/start', 404 values in 4 tensors)
        >>> sorted(corpus[0].weights)
        ['0.bias', '0.weight', '2.bias', '2.weight']
        >>> corpus.query(["architecture=mlp-64-6-2", "step=120"]).num_rows
        38
    """

    def __init__(self, storage: CorpusStorage, manifest: dict[str, Any], *, copies: bool = True) -> None:
        self.storage, self.copies = storage, copies
        self._as_stored = manifest
        contents = Contents.read(manifest, storage)
        self.manifest = {**manifest, "statistics": contents.statistics} if contents.layout_of else manifest
        self.shards, self.networks, self.forms = contents.shards, contents.networks, contents.forms
        self._layout_of = contents.layout_of
        self._shard_at = {shard.path: shard for shard in self.shards}

    def __repr__(self) -> str:
        counts = f"{len(self):,} checkpoints of {len(self.networks):,} architectures and {len(self.tasks):,} tasks"
        return f"Corpus({self.location!r}, {counts})"

    def __len__(self) -> int:
        return self.facts.num_rows

    def __getitem__(self, index: int) -> Checkpoint:
        """Reads the checkpoint of a row of `facts`, bit for bit; negative ones count from the end."""
        facts = self.facts.slice(range(len(self))[index], 1).to_pylist()[0]
        return Checkpoint(facts=facts, weights=self._state(facts))

    def __iter__(self) -> Iterator[Checkpoint]:
        return (Checkpoint(facts=facts, weights=weights) for facts, weights in self.checkpoints())

    def __getstate__(self) -> dict[str, Any]:
        """Another process that is sent an opened corpus reads the same snapshot, through files of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    @classmethod
    def open(cls, location: str | Path, snapshot: str = "", *, copies: bool = True) -> Self:
        """Reads the manifest and checks that every file is there in full length.

        Args:
            location: Path or URI.
            snapshot: Snapshot of the corpus that another process of the same run has opened; any by default.
            copies: Whether shards are mapped, of remote ones a copy in the cache of this machine; else what is used of
                them is read where they lie.

        Raises:
            MissingFileError: There is no corpus, or a file of it is missing.
            DamagedFileError: The manifest cannot be read, facts were changed, or a shard is truncated.
            ChangedCorpusError: The corpus was deleted or rebuilt in the meantime.
            CorpusError: The corpus has another schema version.
        """
        storage = CorpusStorage.at(location)
        try:
            manifest = read_manifest(storage)
            return cls._checked(storage, manifest, snapshot, copies)
        except OSError as error:
            raise CorpusError(
                f"{storage.name} cannot be reached ({error}); check the URI, and that this process has the credentials "
                "of the store, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error

    @classmethod
    def _checked(cls, storage: CorpusStorage, manifest: dict[str, Any], snapshot: str, copies: bool) -> Self:
        corpus = cls(storage, manifest, copies=copies)
        if snapshot and corpus.snapshot != snapshot:
            raise rebuilt(storage)
        try:
            check_shards(storage, corpus.shards)
            # Reading them compares their checksums: changed facts are refused before anything is selected by them.
            _ = corpus.facts, corpus.tasks
        except (DamagedFileError, MissingFileError) as error:
            raise cause(error, storage, manifest) from error
        return corpus

    @property
    def snapshot(self) -> str:
        """Checksum of the corpus' content; another process of the same run passes it to `open`."""
        return checksum(self.manifest)

    @cached_property
    def quarantine(self) -> pa.Table:
        """Entries that were not taken, and why; `kind` distinguishes refused checkpoints from other files."""
        if QUARANTINE not in self.manifest["files"]:
            return QUARANTINE_SCHEMA.empty_table()
        return self._read_facts(QUARANTINE)

    def page_sums(self, checkpoint_id: str) -> bytes | None:
        """Returns the checksums of a checkpoint's pages (see `checksums`); None if it has one page or they are unknown.

        Raises:
            MissingFileError, DamagedFileError: They cannot be read.
        """
        return self._page_sums.get(checkpoint_id)

    @cached_property
    def _page_sums(self) -> dict[str, bytes]:
        if PAGES not in self.manifest["files"]:
            return {}
        table = self._read_facts(PAGES)
        return dict(zip(*(table.column(name).to_pylist() for name in PAGES_SCHEMA.names), strict=True))

    def moments(self, layout_id: str) -> dict[str, tuple[float, float]]:
        """Returns mean and standard deviation of each tensor over all checkpoints of a layout; empty if unknown."""
        content = self.manifest.get("statistics", {}).get(layout_id)
        return LayoutStatistics.from_json(content).moments() if content else {}

    @property
    def location(self) -> str:
        """Path or URI, as it was opened."""
        return self.storage.name

    @cached_property
    def facts(self) -> pa.Table:
        """Facts of all checkpoints, one row each."""
        return self._read_facts(CHECKPOINTS)

    @cached_property
    def tasks(self) -> dict[str, TaskFacts]:
        """Task id -> task."""
        tasks = tasks_from_table(self._read_facts(TASKS))
        return {name: with_source(task, self.location) for name, task in tasks.items()}

    def layout(self, layout_id: str) -> Layout:
        """Returns the layout with an id, in the order of its flat vector."""
        return self.networks[layout_id].layout

    def arrange(self, known: Iterable[Layout]) -> None:
        """Changes the order of flat vectors to that of other forms of the same architectures, such as a generator's."""
        for layout in known:
            if network := self.networks.get(layout.id):
                arranged = network.layout.arranged_like(layout)
                self.networks[layout.id] = replace(network, layout=arranged)
        self.forms = {key: form.arranged_like(self.layout(form.id)) for key, form in self.forms.items()}

    def form(self, shard: str) -> Layout:
        """Returns the form in which a shard stores its checkpoints: their own order, dtypes and names."""
        if shard not in self._shard_at:
            raise DamagedFileError(f"{self.location}: facts name a shard {shard!r} that {MANIFEST} lacks; {RESTORE}")
        known = self._shard_at[shard]
        return self.forms[known.form_id] if known.form_id else self.layout(known.layout_id)

    def by_form(self, facts: pa.Table) -> Iterator[tuple[Layout, pa.Table, np.ndarray]]:
        """Groups checkpoints by form: yields the form, their facts, and their row indices in the table."""
        shards = facts.column("shard").to_pylist()
        forms = {shard: self.form(shard) for shard in dict.fromkeys(shards)}
        places: dict[str, list[int]] = {}
        for place, shard in enumerate(shards):
            places.setdefault(forms[shard].form_id, []).append(place)
        for rows in places.values():
            yield forms[shards[rows[0]]], facts if len(rows) == len(shards) else facts.take(rows), np.array(rows)

    def select(self, **equals: Any) -> pa.Table:
        """Returns the facts of the checkpoints with these values; a list or tuple means any of its values.

        Raises:
            UnknownFactError: Checkpoints have no such fact; the message names the nearest.
        """
        return select_facts(self.facts, equals)

    def query(self, terms: Sequence[str]) -> pa.Table:
        """Returns facts of checkpoints that satisfy all terms, such as `architecture=resnet20`, `test_accuracy>0.9`.

        Raises:
            CorpusError, UnknownFactError: A term is not a query; see `raywgen.corpus.query`.
        """
        return filter_facts(self.facts, terms)

    def checkpoints(self, terms: Sequence[str] = ()) -> Iterator[tuple[dict[str, Any], StateDict]]:
        """Yields facts and weights of every checkpoint that satisfies all terms, bit for bit.

        Raises:
            DamagedFileError: A checkpoint's bytes have changed since they were written.
        """
        facts = self.query(terms)
        for start in range(0, facts.num_rows, _FACTS_PER_BLOCK):
            for row in facts.slice(start, _FACTS_PER_BLOCK).to_pylist():
                yield row, self._state(row)

    def trajectories(self, terms: Sequence[str] = ()) -> Iterator[tuple[str, pa.Table]]:
        """Yields id and facts, in step order, of every trajectory with a checkpoint that satisfies all terms."""
        facts = self.query(terms).sort_by([("trajectory_id", "ascending"), ("step", "ascending")])
        ids = facts.column("trajectory_id").to_pylist()
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or ids[end] != ids[start]:
                yield ids[start], facts.slice(start, end - start)
                start = end

    def packed(self, facts: pa.Table) -> Tensor:
        """Reads packed weights uint8 `(N, P)` of checkpoints of one form (see `by_form`), in the table's order.

        Args:
            facts: Rows of `facts`; a column `stored_id` holds the ids in the shards if they were changed.

        Raises:
            CorpusError: The table is empty, or holds checkpoints of several layouts or forms.
            DamagedFileError: A shard cannot be read, or a checkpoint's bytes are not those that were written.
            ChangedCorpusError: The corpus was deleted or rebuilt in the meantime.
        """
        layout_ids = set(facts.column("layout_id").to_pylist())
        if len(layout_ids) != 1:
            found = f"checkpoints of {len(layout_ids)} layouts are" if layout_ids else "no checkpoint is"
            raise CorpusError(f"{self.location}: {found} selected; select some of one layout by layout_id")
        forms = {form.form_id: form for form in map(self.form, set(facts.column("shard").to_pylist()))}
        if len(forms) > 1:
            raise CorpusError(
                f"{self.location}: checkpoints of {len(forms)} orders or dtypes of a layout are selected; take those "
                "of one at a time"
            )
        (layout,) = forms.values()
        shard_N, row_N = np.array(facts.column("shard").to_pylist()), facts.column("row").to_numpy()
        stored = "stored_id" if "stored_id" in facts.column_names else "checkpoint_id"
        id_N = np.array(facts.column(stored).to_pylist(), dtype=object)
        out_NP = torch.empty(facts.num_rows, layout.num_bytes, dtype=torch.uint8)
        for path in dict.fromkeys(shard_N.tolist()):
            wanted = np.flatnonzero(shard_N == path)
            out_NP[wanted] = self._reader.rows(self._shard_at[path], row_N[wanted], id_N[wanted], layout)
        return out_NP

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(self.storage, self._as_stored, self.facts, self.page_sums, copies=self.copies)

    def view(self, path: str, layout: Layout) -> WeightsView:
        """Returns a view of a shard's weights; raises as `ShardReader.view` does."""
        return self._reader.view(self._shard_at[path], layout)

    def checked_block(self, block: pa.Table) -> tuple[list[str], Layout, Tensor]:
        """Returns ids, form and packed weights uint8 `(N, P)` of a block of `blocks` or `dataset`.

        Raises:
            DamagedFileError: A checkpoint's bytes have changed since they were written.
            ChangedCorpusError: The corpus was deleted or rebuilt in the meantime.
        """
        return self._reader.checked_block(block, self.form)

    def values(self, facts: pa.Table) -> Tensor:
        """Reads flat vectors float32 `(N, D)` of checkpoints of one layout, in the table's order."""
        forms = list(self.by_form(facts))
        if len(set(facts.column("layout_id").to_pylist())) != 1 or len(forms) == 1:
            packed_NP = self.packed(facts)
            return forms[0][0].values(packed_NP)
        values_ND = torch.empty(facts.num_rows, forms[0][0].num_values)
        for layout, part, place_N in forms:
            values_ND[place_N] = layout.values(self.packed(part))
        return values_ND

    def state_dict(self, checkpoint_id: str) -> StateDict:
        """Reads one checkpoint, bit for bit.

        Raises:
            UnknownFactError: The corpus does not hold it.
            DamagedFileError: Its bytes have changed since they were written.
        """
        facts = self.select(checkpoint_id=checkpoint_id)
        if facts.num_rows != 1:
            raise UnknownFactError(f"{self.location} holds no checkpoint '{checkpoint_id}'; see its facts")
        return self._state(facts.to_pylist()[0])

    def _state(self, row: dict[str, Any]) -> StateDict:
        """Reads the checkpoint of a row of facts into memory of its own."""
        form = self.form(row["shard"])
        return form.unpack(
            self._reader.row(self._shard_at[row["shard"]], row["row"], row["checkpoint_id"], form).clone()
        )

    def kept_tensors(self, layout_id: str) -> StateDict:
        """Returns the tensors of a network that no generator writes, such as masks, under the names of its layout.

        They are taken from the first checkpoint, without counts of batches, which belong to that checkpoint alone.
        """
        facts = self.select(layout_id=layout_id).slice(0, 1)
        row = facts.to_pylist()[0]
        form, network = self.form(row["shard"]), self.layout(layout_id)
        state, names = self._state(row), network.names_in(form)
        wanted = (spec.name for spec in network.tensors if not spec.is_generated and not spec.tied_to)
        return {name: state[names[name]].clone() for name in wanted if not name.endswith("num_batches_tracked")}

    def base_values(self, layout_id: str) -> Tensor | None:
        """Returns the shared start `(D,)` of a layout's networks, or None if they have none."""
        facts = self.select(layout_id=layout_id, split="base")
        return self.values(facts)[0] if facts.num_rows == 1 else None

    def stream(self, **settings: Any) -> ChunkStream:
        """Returns a stream of batches of chunks for one worker; takes the settings of `ChunkStream`."""
        from raywgen.corpus.chunk_stream import ChunkStream

        return ChunkStream(self, **settings)

    def windows(self, **settings: Any) -> TrajectoryStream:
        """Returns a stream of trajectory windows for one worker; takes the settings of `TrajectoryStream`."""
        from raywgen.corpus.trajectory_stream import TrajectoryStream

        return TrajectoryStream(self, **settings)

    def dataset(self, splits: Sequence[str]) -> ray.data.Dataset:
        """Returns whole record batches as a Ray Data set; see `raywgen.corpus.dataset`."""
        from raywgen.corpus.dataset import dataset

        return dataset(self, splits)

    def blocks(self, splits: Sequence[str]) -> Iterator[pa.Table]:
        """Reads the blocks of `dataset` in this process, without Ray.

        Raises:
            CorpusError: No checkpoint belongs to these splits.
        """
        for shard in self.shards_of(splits):
            yield from self._reader.blocks(shard)

    def shards_of(self, splits: Sequence[str]) -> list[Shard]:
        """Returns the shards with checkpoints of these splits; a shard holds one split only.

        Raises:
            CorpusError: There is no such shard.
        """
        wanted = set(self.select(split=list(splits)).column("shard").to_pylist())
        if not wanted:
            raise CorpusError(
                f"{self.location} has no checkpoint of the splits {list(splits)}; see `raywgen corpus info`"
            )
        return [shard for shard in self.shards if shard.path in wanted]

    def info(self) -> dict[str, Any]:
        """Returns counts for people and scripts."""
        return summary(self)

    def _read_facts(self, kind: str) -> pa.Table:
        table = read_facts(self.storage, self.manifest, kind)
        if not self._layout_of or kind != CHECKPOINTS:
            return table
        ids = [self._layout_of.get(name, name) for name in table.column("layout_id").to_pylist()]
        return table.set_column(table.schema.get_field_index("layout_id"), "layout_id", pa.array(ids, pa.string()))
