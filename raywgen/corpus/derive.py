"""Derives new corpora from old ones: selections, splits, deduplication, changed weights."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import torch
from torch import Tensor

from raywgen.corpus.at_once import networks_at_once
from raywgen.corpus.checksums import row_sums
from raywgen.corpus.commit import commit_corpus
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import (
    CHECKPOINT_COLUMNS,
    CHECKPOINT_SCHEMA,
    CheckpointFacts,
    FactValue,
    NetworkFacts,
    TaskFacts,
)
from raywgen.corpus.manifest import MANIFEST
from raywgen.corpus.near_duplicates import networks_apart
from raywgen.corpus.shards import Shard, write_shard
from raywgen.corpus.statistics import LayoutStatistics, Statistics, add_statistics
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.writing import remove_unused_shards, writing
from raywgen.json_types import JsonObject
from raywgen.out_folder import checked_out
from raywgen.weights import Layout

_SHARD_BYTES = 256 << 20
_SHARD_CHECKPOINTS = 4_096
_SIDES = ("train", "heldout")
OnCheckpoint = Callable[[int, int], None]
"""Called with the number of checkpoints written and their total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The checkpoints to take from one corpus, with the facts that they will have.

    Attributes:
        corpus: The old corpus.
        facts: Rows of its facts, changed as wanted.
        change: Maps facts and packed weights `(N, P)` of one form to new packed weights; None copies bit for bit.
    """

    corpus: Corpus
    facts: pa.Table
    change: Callable[[pa.Table, Tensor], Tensor] | None = None


def write_corpus(
    root: str, parts: Sequence[Selection], recipe: JsonObject, on_progress: OnCheckpoint | None = None
) -> Corpus:
    """Copies checkpoints into a new corpus, bit for bit unless a selection changes them.

    Raises:
        OutError: Nothing can or should be written to `root`.
        CorpusError: `root` holds a corpus, nothing is selected, or two checkpoints have one id.
        DamagedFileError: An old shard cannot be read.
        InUseError: Another process works on `root`.
    """
    root = new_root(root)
    if not sum(part.facts.num_rows for part in parts):
        raise CorpusError("no checkpoint is selected; see `raywgen corpus info` for what there is")
    with writing(root):
        _refuse_existing(root)  # The process that held the folder a moment ago may have finished a corpus.
        shards: list[Shard] = []
        try:
            corpus = _write_corpus(root, parts, recipe, on_progress, shards)
        except BaseException:  # Ctrl-C must not leave anything behind either.
            for shard in shards:
                CorpusStorage.at(root).delete(shard.path)
            raise
        remove_unused_shards(corpus)
        return corpus


def _write_corpus(
    root: str, parts: Sequence[Selection], recipe: JsonObject, on_progress: OnCheckpoint | None, shards: list[Shard]
) -> Corpus:
    """Writes the corpus, and adds each written shard to `shards`."""
    total = sum(part.facts.num_rows for part in parts)
    networks: dict[str, NetworkFacts] = {}
    tasks: dict[str, TaskFacts] = {}
    for part in parts:
        used = set(part.facts.column("layout_id").to_pylist())
        for key, network in part.corpus.networks.items():
            if key in used and (key not in networks or not networks[key].recipe):
                networks[key] = network
        tasks |= {key: task for key, task in part.corpus.tasks.items() if key not in tasks}
    forms: dict[str, Layout] = {}
    statistics: Statistics = {}
    done = 0
    for part in parts:
        for group in groups_of_shards(part.corpus, part.facts):
            layout = part.corpus.form(group.column("shard")[0].as_py())
            packed_NP = part.corpus.packed(group)
            if part.change is not None:
                packed_NP = part.change(group, packed_NP)
            name = hashlib.sha256(f"{len(shards)}/{group.column('checkpoint_id')[0]}".encode()).hexdigest()[:12]
            shards.append(
                write_shard(root, f"{len(shards):06d}-{name}", layout, new_facts(group), packed_NP, is_finite=True)
            )
            forms[layout.form_id] = layout
            sums = LayoutStatistics.measure(layout, packed_NP).named_as(layout, networks[layout.id].layout)
            add_statistics(statistics, (layout.id, group.column("split")[0].as_py()), sums)
            done += group.num_rows
            if on_progress is not None:
                on_progress(done, total)
    return commit_corpus(
        root,
        shards=shards,
        tasks=list(tasks.values()),
        networks=_unique(list(networks.values())),
        recipe=recipe | {"of": [part.corpus.location for part in parts]},
        statistics=statistics,
        forms=forms,
    )


def new_root(root: str) -> str:
    """Returns the folder of a new corpus, which is checked before any work is done for it.

    Raises:
        OutError: Nothing can or should be written to `root`.
        CorpusError: `root` holds a corpus.
    """
    root = checked_out(root, "runs/corpus")
    _refuse_existing(root)
    return root


def _refuse_existing(root: str) -> None:
    if CorpusStorage.at(root).size(MANIFEST) is not None:
        raise CorpusError(f"{root} already holds a corpus; give another folder")


def _unique(networks: list[NetworkFacts]) -> list[NetworkFacts]:
    """Adds the id of the layout to names that several layouts have."""
    counts = Counter(network.name for network in networks)
    return [
        replace(network, name=f"{network.name}-{network.layout.id[:6]}") if counts[network.name] > 1 else network
        for network in networks
    ]


def split(
    root: str,
    corpus: Corpus,
    *,
    by: str = "trajectory_id",
    heldout: float = 0.1,
    seed: int = 0,
    on_progress: OnCheckpoint | None = None,
) -> Corpus:
    """Holds out whole groups: a trajectory, task or architecture is never on both sides.

    Starts, and tasks that a zoo holds out as a whole (`validation`, `unseen`), keep their split.

    Args:
        root: Path or URI of the new corpus.
        corpus: The corpus to split.
        by: The fact that groups checkpoints.
        heldout: Share of the groups to hold out, in (0, 1).
        seed: Seed of the choice of groups.
        on_progress: Called with the number of checkpoints written and their total.

    Raises:
        CorpusError: The share leaves one side empty, or `write_corpus` raises it.
        UnknownFactError: There is no such fact.
    """
    root = new_root(root)
    corpus.select(**{by: []})  # refuses an unknown fact
    groups = corpus.facts.column(by).to_pylist()
    splits = corpus.facts.column("split").to_pylist()
    named = sorted({str(group) for group, split in zip(groups, splits, strict=True) if split in _SIDES})
    # A group's rank depends on its own name and the seed, so a corpus that has grown keeps most sides.
    rank = sorted(named, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    held = set(rank[: round(heldout * len(rank))]) if 0 < heldout < 1 else set()
    if not 0 < len(held) < len(named):
        raise CorpusError(f"heldout={heldout} of {len(named)} groups by {by} leaves one side empty; give another share")
    sides = [
        split if split not in _SIDES else "heldout" if str(group) in held else "train"
        for group, split in zip(groups, splits, strict=True)
    ]
    facts = replace_columns(corpus.facts, split=sides)
    return write_corpus(root, [Selection(corpus=corpus, facts=facts)], {"split": by, "seed": seed}, on_progress)


def dedupe(root: str, corpus: Corpus, *, near: float = 0.0, on_progress: OnCheckpoint | None = None) -> Corpus:
    """Keeps the first of all checkpoints that are equal, or nearly equal.

    Args:
        root: Path or URI of the new corpus.
        corpus: The corpus to deduplicate.
        near: Largest distance, divided by the norm of the kept checkpoint, of a duplicate; 0 means equal bytes.
        on_progress: Called with the number of checkpoints written and their total.

    Raises:
        CorpusError: `near` is negative, or `write_corpus` raises it.
    """
    if near < 0:
        raise CorpusError(f"near={near}: must be at least 0")
    root = new_root(root)
    facts = corpus.facts
    keys = list(zip(facts.column("layout_id").to_pylist(), _contents(corpus), strict=True))
    first: dict[tuple[str, str], int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    kept = sorted(first.values())
    if near > 0:
        kept = [index for layout_id in corpus.networks for index in networks_apart(corpus, layout_id, kept, near)]
    part = Selection(corpus=corpus, facts=facts.take(sorted(kept)))
    return write_corpus(root, [part], {"dedupe": near}, on_progress)


def _contents(corpus: Corpus) -> list[str]:
    """Returns a digest of every checkpoint that does not depend on the order of its tensors in the file."""
    digests = corpus.facts.column("sha256").to_pylist()
    for form, facts, place_N in corpus.by_form(corpus.facts):
        if form.packing is None:
            continue
        flat = Layout(form.tensors)
        at_once = networks_at_once(form.num_bytes // 4)
        for start in range(0, len(place_N), at_once):
            packed_NP = corpus.packed(facts.slice(start, at_once))
            sums = row_sums(torch.stack([flat.pack(form.unpack(packed_P)) for packed_P in packed_NP]))
            for place, digest in zip(place_N[start : start + at_once].tolist(), sums, strict=True):
                digests[place] = digest
    return digests


def groups_of_shards(corpus: Corpus, facts: pa.Table) -> Iterator[pa.Table]:
    """Yields rows of one form and one split, as many as a shard holds, in the order of the old shards."""
    forms = [corpus.form(shard) for shard in facts.column("shard").to_pylist()]
    keys = zip([form.form_id for form in forms], facts.column("split").to_pylist(), strict=True)
    places: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(keys):
        places.setdefault(key, []).append(index)
    for rows in places.values():
        size = max(1, forms[rows[0]].num_bytes)
        per_shard = max(1, min(_SHARD_CHECKPOINTS, _SHARD_BYTES // size))
        for start in range(0, len(rows), per_shard):
            yield facts.take(rows[start : start + per_shard])


def new_facts(group: pa.Table) -> list[CheckpointFacts]:
    """Returns facts as a new corpus has them; columns beyond the known ones are the user's own."""
    ours = {*CHECKPOINT_SCHEMA.names, "stored_id"}
    rows = []
    for row in group.to_pylist():
        more = {name: value for name, value in row.items() if name not in ours and value is not None}
        rows.append(CheckpointFacts(**{name: row[name] for name in CHECKPOINT_COLUMNS}, more=more))
    return rows


def replace_columns(facts: pa.Table, stored_id: pa.Table | None = None, **columns: Sequence[FactValue]) -> pa.Table:
    """Replaces columns of facts; `stored_id` gives the table whose ids the old shards use."""
    if stored_id is not None:
        facts = facts.append_column("stored_id", stored_id.column("checkpoint_id"))
    for name, values in columns.items():
        index = facts.schema.get_field_index(name)
        facts = facts.set_column(index, name, pa.array(values, facts.schema.field(name).type))
    return facts
