"""A corpus: checkpoints at rest, Arrow shards plus a manifest.

On disk: `manifest.json`, `checkpoints.parquet` and `tasks.parquet` (facts), `weights/NAME.arrow` (shards). The
manifest is written last and in one step: a folder without one is no corpus, so a reader never sees half of it.

Shape legend: N checkpoints, D values of the flat vector, P packed bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor

from raywgen.corpus.aside import is_refused
from raywgen.corpus.cache import local_copy
from raywgen.corpus.checksums import Checksums, RowCheck
from raywgen.corpus.errors import (
    RESTORE,
    ChangedCorpusError,
    CorpusError,
    DamagedFileError,
    MissingFileError,
    UnknownFactError,
)
from raywgen.corpus.facts import (
    QUARANTINE_SCHEMA,
    NetworkFacts,
    TaskFacts,
    tasks_from_table,
)
from raywgen.corpus.query import filter_facts
from raywgen.corpus.shards import (
    WEIGHTS,
    Shard,
    ShardView,
    checkpoint_ids,
    num_blocks,
    packed_tensor,
    read_block,
    read_shard,
)
from raywgen.corpus.statistics import LayoutStatistics
from raywgen.corpus.storage import Storage
from raywgen.inputs import UnusableFileError, check_stays, inside, parse_json
from raywgen.names import nearest
from raywgen.parquet import bounded_table
from raywgen.sealed import SealError, checksum, unseal
from raywgen.trust import StoredRecipe
from raywgen.weights import Layout, StateDict

if TYPE_CHECKING:
    import ray.data

    from raywgen.corpus.chunk_stream import ChunkStream
    from raywgen.corpus.trajectory_stream import TrajectoryStream

# Arrow makes these functions when it is imported, where no type checker sees them.
pc: Any = pyarrow.compute

SCHEMA_VERSION = 2
# In it every form of an architecture was a layout, named by what is a form's id now.
_LAYOUTS_BY_FORM = 1
# Mapping a shard anew costs a page fault for every 16 pages of it; one that stays mapped costs a file descriptor.
_OPENED_SHARDS = 512
_SHOWN_RUNS = 8
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints.parquet"
TASKS = "tasks.parquet"
QUARANTINE = "quarantine.parquet"


class Corpus:
    """An opened corpus; get one by `Corpus.open`."""

    def __init__(self, storage: Storage, manifest: dict[str, Any]) -> None:
        self.storage = storage
        self.manifest = manifest
        self._opened: dict[str, ShardView] = {}
        self._checks: dict[tuple[str, object], RowCheck] = {}
        try:
            self.shards = [Shard(**row) for row in manifest["shards"]]
            _check_names(storage, [shard.path for shard in self.shards], [shard.sha256 for shard in self.shards])
            _check_names(storage, list(manifest["files"].values()))
            networks = [_with_source(NetworkFacts.from_json(row), storage.name) for row in manifest["networks"]]
            self.networks = {network.layout.id: network for network in reversed(networks)}
            self.networks = {network.layout.id: self.networks[network.layout.id] for network in networks}
            forms = {network.layout.form_id: network.layout for network in networks}
            forms |= {key: Layout.from_json(rows) for key, rows in manifest.get("forms", {}).items()}
            if changed := [key for key, form in forms.items() if form.form_id != key or form.id not in self.networks]:
                raise KeyError(f"the form {changed[0]}")
            self._layout_of: dict[str, str] = {}
            if manifest["schema_version"] == _LAYOUTS_BY_FORM:
                self._read_old_ids(forms)
            self.forms = {key: form.arranged_like(self.networks[form.id].layout) for key, form in forms.items()}
            self._shard_at = {shard.path: shard for shard in self.shards}
            unknown = [shard.path for shard in self.shards if shard.layout_id not in self.networks]
            if unknown or not {CHECKPOINTS, TASKS} <= set(manifest["files"]):
                raise KeyError(f"no network of {unknown[0]}" if unknown else "checksums of the facts")
        except (KeyError, TypeError, AttributeError, UnusableFileError) as error:
            raise DamagedFileError(f"{storage.name}/{MANIFEST} is damaged ({error}); {RESTORE}") from error

    def _read_old_ids(self, forms: dict[str, Layout]) -> None:
        self._layout_of = {form_id: layout.id for form_id, layout in forms.items()}
        self.shards = [
            replace(shard, layout_id=self._layout_of[shard.layout_id], form_id=shard.layout_id) for shard in self.shards
        ]
        stored = self.manifest.get("statistics", {})
        found = {self._layout_of[form_id]: sums for form_id, sums in reversed(stored.items())}
        self.manifest = {**self.manifest, "statistics": found}

    @classmethod
    def open(cls, location: str | Path, snapshot: str = "") -> Self:
        """Reads the manifest and checks that every file is there in full length.

        Args:
            location: Path or URI.
            snapshot: That of the corpus which another process of the same run has opened; any by default.

        Raises:
            MissingFileError: There is no corpus, or a file of it is missing.
            DamagedFileError: The manifest cannot be read, facts were changed, or a shard is truncated.
            ChangedCorpusError: The corpus was deleted or rebuilt in the meantime.
            CorpusError: The corpus has another schema version.
        """
        storage = Storage.at(location)
        manifest = read_manifest(storage)
        corpus = cls(storage, manifest)
        if snapshot and corpus.snapshot != snapshot:
            raise corpus._rebuilt()
        try:
            corpus._look_through()
        except (DamagedFileError, MissingFileError) as error:
            raise corpus._cause(error) from error
        return corpus

    def _look_through(self) -> None:
        """Sizes and facts."""
        storage = self.storage
        for shard in self.shards:
            size = storage.size(shard.path)
            if size is None:
                raise MissingFileError(f"{storage.name}/{shard.path} is missing; {RESTORE}")
            if size != shard.num_bytes:
                raise DamagedFileError(
                    f"{storage.name}/{shard.path} has {size} bytes, the manifest says {shard.num_bytes}; {RESTORE}"
                )
        # Reading them compares their checksums: wrong facts are refused before anything is selected by them.
        _ = self.facts, self.tasks

    def _cause(self, error: CorpusError) -> CorpusError:
        """The error itself, or that the corpus is no longer the one that was opened."""
        try:
            is_same = read_manifest(self.storage) == self.manifest
        except MissingFileError:
            return ChangedCorpusError(
                f"{self.location} was deleted, or is being rebuilt, while it was read; "
                "run the same command again when it is there"
            )
        except CorpusError as other:
            return other
        if is_same:
            return error
        return self._rebuilt()

    def _rebuilt(self) -> ChangedCorpusError:
        return ChangedCorpusError(f"{self.location} was rebuilt while it was read; run the same command again")

    @property
    def snapshot(self) -> str:
        """Changes with all that the corpus holds; another process of the same run gives it to `open`."""
        return checksum(self.manifest)

    @cached_property
    def quarantine(self) -> pa.Table:
        """What was not taken, and why: `kind` tells refused checkpoints from what was passed over."""
        if QUARANTINE not in self.manifest["files"]:
            return QUARANTINE_SCHEMA.empty_table()
        return self._read_facts(QUARANTINE)

    def moments(self, layout_id: str) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each tensor over all checkpoints of a layout; empty where not measured."""
        content = self.manifest.get("statistics", {}).get(layout_id)
        return LayoutStatistics.from_json(content).moments() if content else {}

    @property
    def location(self) -> str:
        """Path or URI, as it was opened."""
        return self.storage.name

    @cached_property
    def facts(self) -> pa.Table:
        """One row a checkpoint."""
        return self._read_facts(CHECKPOINTS)

    @cached_property
    def tasks(self) -> dict[str, TaskFacts]:
        """Task id -> task."""
        tasks = tasks_from_table(self._read_facts(TASKS))
        return {name: _with_source(task, self.location) for name, task in tasks.items()}

    def layout(self, layout_id: str) -> Layout:
        """The layout of that id: in the order of its flat vector."""
        return self.networks[layout_id].layout

    def arrange(self, known: Iterable[Layout]) -> None:
        """Gives flat vectors the order that other forms of the same architectures have, such as a generator's."""
        for layout in known:
            if network := self.networks.get(layout.id):
                arranged = network.layout.arranged_like(layout)
                self.networks[layout.id] = replace(network, layout=arranged)
        self.forms = {key: form.arranged_like(self.layout(form.id)) for key, form in self.forms.items()}

    def form(self, shard: str) -> Layout:
        """The form in which the checkpoints of a shard lie: their own order, dtypes and names."""
        if shard not in self._shard_at:
            raise DamagedFileError(f"{self.location}: facts name a shard {shard!r} that {MANIFEST} lacks; {RESTORE}")
        known = self._shard_at[shard]
        return self.forms[known.form_id] if known.form_id else self.layout(known.layout_id)

    def by_form(self, facts: pa.Table) -> Iterator[tuple[Layout, pa.Table, np.ndarray]]:
        """Checkpoints of one form at a time: the form, their facts, and their places in the table."""
        shards = facts.column("shard").to_pylist()
        forms = {shard: self.form(shard) for shard in dict.fromkeys(shards)}
        places: dict[str, list[int]] = {}
        for place, shard in enumerate(shards):
            places.setdefault(forms[shard].form_id, []).append(place)
        for rows in places.values():
            yield forms[shards[rows[0]]], facts if len(rows) == len(shards) else facts.take(rows), np.array(rows)

    def select(self, **equals: Any) -> pa.Table:
        """Facts of the checkpoints with these values; a list or tuple means any of them.

        Raises:
            UnknownFactError: Checkpoints have no such fact; the nearest is named.
        """
        mask = None
        for name, wanted in equals.items():
            if name not in self.facts.column_names:
                near = nearest(name, self.facts.column_names)
                raise UnknownFactError(f"unknown fact '{name}'; did you mean '{near}'?")
            column = self.facts.column(name)
            values = wanted if isinstance(wanted, list | tuple) else [wanted]
            hit = pc.is_in(column, value_set=pa.array(values, column.type))
            mask = hit if mask is None else pc.and_(mask, hit)
        return self.facts if mask is None else self.facts.filter(mask)

    def query(self, terms: Sequence[str]) -> pa.Table:
        """Facts of the checkpoints that satisfy all terms, such as `architecture=resnet20`, `test_accuracy>0.9`.

        Raises:
            CorpusError, UnknownFactError: A term is no query; see `raywgen.corpus.query`.
        """
        return filter_facts(self.facts, terms)

    def checkpoints(self, terms: Sequence[str] = ()) -> Iterator[tuple[dict[str, Any], StateDict]]:
        """Facts and weights of every checkpoint that satisfies all terms, one at a time, bit for bit.

        Raises:
            DamagedFileError: A checkpoint's bytes are not those that were written.
        """
        facts = self.query(terms)
        for index in range(facts.num_rows):
            row = facts.slice(index, 1)
            yield row.to_pylist()[0], self._state(row)

    def trajectories(self, terms: Sequence[str] = ()) -> Iterator[tuple[str, pa.Table]]:
        """Id and facts, in step order, of every trajectory of which a checkpoint satisfies all terms."""
        facts = self.query(terms).sort_by([("trajectory_id", "ascending"), ("step", "ascending")])
        ids = facts.column("trajectory_id").to_pylist()
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or ids[end] != ids[start]:
                yield ids[start], facts.slice(start, end - start)
                start = end

    def packed(self, facts: pa.Table) -> Tensor:
        """Packed weights uint8 `(N, P)` of checkpoints of one form (see `by_form`), in the table's order.

        Args:
            facts: Rows of `facts`; a column `stored_id` holds the ids in the shards where they were changed.

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
            out_NP[wanted] = self._read_rows(path, row_N[wanted], id_N[wanted], layout)
        return out_NP

    def _read_rows(self, path: str, row_N: np.ndarray, id_N: np.ndarray, layout: Layout) -> Tensor:
        view = self.view(path, layout)
        stored = np.array(view.ids, dtype=object)
        if len(stored) <= row_N.max() or (stored[row_N] != id_N).any():
            raise self._failure(path, f"does not hold checkpoint '{id_N[0]}' and others where the facts say")
        # Rows of a tensor, not of the table: Arrow copies by stored offsets, which it does not check.
        return view.rows(row_N)

    def view(self, path: str, layout: Layout) -> ShardView:
        """A shard's weights where they lie; the last ones asked for stay open.

        Raises:
            MissingFileError, DamagedFileError: It cannot be read.
            ChangedCorpusError: The corpus was deleted or rebuilt in the meantime.
        """
        if path in self._opened:
            self._opened[path] = self._opened.pop(path)
            return self._opened[path]
        try:
            table = read_shard(*local_copy(self.storage, self._shard_at[path]))
            self._opened[path] = ShardView(table, layout, self._row_check(path))
        except MissingFileError as error:
            raise self._cause(error) from error
        except DamagedFileError as error:
            raise self._cause(DamagedFileError(f"{self.location}/{path}: {error}")) from error
        if len(self._opened) > _OPENED_SHARDS:
            del self._opened[next(iter(self._opened))]
        return self._opened[path]

    def checked_block(self, block: pa.Table) -> tuple[list[str], Layout, Tensor]:
        """Ids, form and packed weights uint8 `(N, P)` of a block of `blocks` or `dataset`.

        Raises:
            DamagedFileError: A checkpoint's bytes are not those that were written.
            ChangedCorpusError: The corpus was deleted or rebuilt in the meantime.
        """
        first = block.column("checkpoint_id")[0].as_py()
        if first not in self._shard_of:
            raise self._failure(WEIGHTS, f"holds a checkpoint '{first}' that is not among the facts")
        layout = self.form(self._shard_of[first])
        ids, packed_NP = checkpoint_ids(block, layout), packed_tensor(block, layout)
        if (changed := self._checksums.first_changed(ids, packed_NP)) is not None:
            raise self._failure(WEIGHTS, f"checkpoint '{changed}' has another checksum than its facts")
        return ids, layout, packed_NP

    @cached_property
    def _checksums(self) -> Checksums:
        return Checksums(self.facts)

    @cached_property
    def _shard_of(self) -> dict[str, str]:
        """Checkpoint id -> path of its shard."""
        return dict(zip(*(self.facts.column(name).to_pylist() for name in ("checkpoint_id", "shard")), strict=True))

    def _row_check(self, path: str) -> RowCheck:
        """The check of a shard; one for as long as its file is the same, so that no checkpoint is compared twice."""
        key = path, self.storage.version(path)
        if key not in self._checks:
            self._checks[key] = self._checksums.check_of(path, partial(self._failure, path))
        return self._checks[key]

    def _failure(self, path: str, reason: str) -> CorpusError:
        return self._cause(DamagedFileError(f"{self.location}/{path}: {reason}; {RESTORE}"))

    def values(self, facts: pa.Table) -> Tensor:
        """Flat vectors float32 `(N, D)` of checkpoints of one layout, in the table's order."""
        forms = list(self.by_form(facts))
        if len(set(facts.column("layout_id").to_pylist())) != 1 or len(forms) == 1:
            packed_NP = self.packed(facts)
            return forms[0][0].values(packed_NP)
        values_ND = torch.empty(facts.num_rows, forms[0][0].num_values)
        for layout, part, place_N in forms:
            values_ND[place_N] = layout.values(self.packed(part))
        return values_ND

    def state_dict(self, checkpoint_id: str) -> StateDict:
        """One checkpoint, bit for bit.

        Raises:
            UnknownFactError: The corpus does not hold it.
            DamagedFileError: Its bytes are not those that were written.
        """
        facts = self.select(checkpoint_id=checkpoint_id)
        if facts.num_rows != 1:
            raise UnknownFactError(f"{self.location} holds no checkpoint '{checkpoint_id}'; see its facts")
        return self._state(facts)

    def _state(self, facts: pa.Table) -> StateDict:
        packed_1P = self.packed(facts)
        return self.form(facts.column("shard")[0].as_py()).unpack(packed_1P[0])

    def kept_tensors(self, layout_id: str) -> StateDict:
        """The tensors of a network that no generator writes, such as masks, under the names of its layout.

        They are those of the first checkpoint; counts of batches stay with the networks that counted them.
        """
        facts = self.select(layout_id=layout_id).slice(0, 1)
        form, network = self.form(facts.column("shard")[0].as_py()), self.layout(layout_id)
        state, names = self._state(facts), network.names_in(form)
        wanted = (spec.name for spec in network.tensors if not spec.is_generated and not spec.tied_to)
        return {name: state[names[name]].clone() for name in wanted if not name.endswith("num_batches_tracked")}

    def base_values(self, layout_id: str) -> Tensor | None:
        """The shared start `(D,)` of a layout's networks, or None where each starts on its own."""
        facts = self.select(layout_id=layout_id, split="base")
        return self.values(facts)[0] if facts.num_rows == 1 else None

    def stream(self, **settings: Any) -> ChunkStream:
        """Batches of chunks for one worker; takes what `ChunkStream` takes."""
        from raywgen.corpus.chunk_stream import ChunkStream

        return ChunkStream(self, **settings)

    def windows(self, **settings: Any) -> TrajectoryStream:
        """Batches of trajectory windows for one worker; takes what `TrajectoryStream` takes."""
        from raywgen.corpus.trajectory_stream import TrajectoryStream

        return TrajectoryStream(self, **settings)

    def dataset(self, splits: Sequence[str]) -> ray.data.Dataset:
        """Whole record batches as a Ray Data set; see `raywgen.corpus.dataset`."""
        from raywgen.corpus.dataset import dataset

        return dataset(self, splits)

    def blocks(self, splits: Sequence[str]) -> Iterator[pa.Table]:
        """The blocks of `dataset`, read in this process without Ray.

        Raises:
            CorpusError: No checkpoint is of these splits.
        """
        for shard in self.shards_of(splits):
            try:
                for index in range(num_blocks(self.storage, shard.path)):
                    yield read_block(self.storage, shard.path, shard.layout_id, index)
            except (DamagedFileError, MissingFileError) as error:
                raise self._cause(error) from error

    def shards_of(self, splits: Sequence[str]) -> list[Shard]:
        """The shards with a checkpoint of these splits; a shard holds one split, so all of it is wanted.

        Raises:
            CorpusError: There is none.
        """
        wanted = set(self.select(split=list(splits)).column("shard").to_pylist())
        if not wanted:
            raise CorpusError(
                f"{self.location} has no checkpoint of the splits {list(splits)}; see `raywgen corpus info`"
            )
        return [shard for shard in self.shards if shard.path in wanted]

    def info(self) -> dict[str, Any]:
        """Counts for people and scripts."""
        facts = self.facts
        accuracy = facts.column("test_accuracy")
        known = accuracy.filter(pc.is_finite(accuracy))
        refused = sum(map(is_refused, self.quarantine.to_pylist()))
        runs = Counter(facts.column("trajectory_id").to_pylist())
        return {
            "location": self.location,
            "schema_version": self.manifest["schema_version"],
            "checkpoints": facts.num_rows,
            "trajectories": len(runs),
            "steps_of_trajectories": {name: count for name, count in runs.most_common(_SHOWN_RUNS) if count > 1},
            "tasks": dict(Counter(task.split for task in self.tasks.values())),
            "networks": {net.name: net.layout.num_values for net in self.networks.values()},
            "splits": dict(Counter(facts.column("split").to_pylist())),
            "starts": dict(Counter(facts.column("start").to_pylist())),
            "values": pc.sum(facts.column("num_values")).as_py() or 0,
            "dtypes": dict(Counter(facts.column("dtype").to_pylist())),
            "quarantined": refused,
            "passed_over": self.quarantine.num_rows - refused,
            "bytes": sum(shard.num_bytes for shard in self.shards),
            "shards": len(self.shards),
            "test_accuracy": [pc.min(known).as_py(), pc.max(known).as_py()] if len(known) else None,
            "licences": sorted(set(facts.column("licence").to_pylist())),
        }

    def _read_facts(self, kind: str) -> pa.Table:
        name = self.manifest["files"][kind]
        content = self.storage.read(name)
        if hashlib.sha256(content).hexdigest() != self.manifest["sha256"][name]:
            raise DamagedFileError(f"{self.location}/{name} has another checksum than the manifest says; {RESTORE}")
        # Without threads: a short process that ends while Arrow's are still starting is aborted now and then.
        try:
            table = bounded_table(pa.BufferReader(content), name)
        except (UnusableFileError, pa.ArrowException, OSError) as error:
            raise DamagedFileError(f"{self.location}/{name} cannot be read ({error}); {RESTORE}") from error
        if not self._layout_of or kind != CHECKPOINTS:
            return table
        ids = [self._layout_of.get(name, name) for name in table.column("layout_id").to_pylist()]
        return table.set_column(table.schema.get_field_index("layout_id"), "layout_id", pa.array(ids, pa.string()))


def _check_names(storage: Storage, names: Sequence[Any], checksums: Sequence[Any] = ()) -> None:
    """Refuses files that lie outside of the corpus, and checksums that could be the name of any file."""
    for name in names:
        inside(name)
        if storage.is_local:
            check_stays(storage.root, name)
    if wrong := [told for told in checksums if not isinstance(told, str) or not re.fullmatch("[0-9a-f]{64}", told)]:
        raise UnusableFileError(f"{wrong[0]!r} is no checksum")


FactsT = TypeVar("FactsT", NetworkFacts, TaskFacts)


def _with_source(facts: FactsT, location: str) -> FactsT:
    if not isinstance(facts.recipe, dict):
        raise DamagedFileError(f"{location}: a recipe is {facts.recipe!r} and no JSON object; {RESTORE}")
    return replace(facts, recipe=StoredRecipe.of(facts.recipe, location))


def read_manifest(storage: Storage) -> dict[str, Any]:
    """The content of `manifest.json`; raises as `Corpus.open` does."""
    if storage.size(MANIFEST) is None:
        raise MissingFileError(
            f"{storage.name} holds no {MANIFEST}: it is no corpus; "
            "make one by `raywgen corpus build` or `raywgen zoo train`"
        )
    try:
        text = storage.read(MANIFEST)
        manifest = parse_json(text)
        version = manifest["schema_version"]
        missing = {"recipe", "networks", "shards", "files", "sha256", "checksum"} - set(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{storage.name}/{MANIFEST} is damaged ({error}); {RESTORE}") from error
    if version not in (_LAYOUTS_BY_FORM, SCHEMA_VERSION):
        raise CorpusError(
            f"{storage.name} has corpus schema {version}, this version reads {SCHEMA_VERSION}; "
            "use the version of raywgen that wrote it"
        )
    if missing:
        raise DamagedFileError(f"{storage.name}/{MANIFEST} lacks {sorted(missing)}; {RESTORE}")
    try:
        return unseal(text)
    except SealError as error:
        raise DamagedFileError(f"{storage.name}/{MANIFEST} is damaged: {error}; {RESTORE}") from error
