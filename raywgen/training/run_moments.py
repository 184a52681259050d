"""The moments of groups that share a scale, which windows of a run's checkpoints need beside their values.

Where scales are tokens, a window of a network follows from numbers that are measured over whole groups of values, which
may reach beyond it. They are measured once, in one pass over the networks that holds no more than a part of one, and
kept beside the run: a file for each shard of weights, with the moments of its checkpoints. Every worker makes the files
of its share of the shards; those that are there are used as they are. Readers map them, on each node from a copy of its
own where the run folder is at a URI.

Shape letters beyond the legend in `raywgen.weights`: M moments of a network, Y header chunks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.generators import Generator, Stage
from raywgen.locations import joined
from raywgen.storage import Storage
from raywgen.training.rows import LayoutRows, RunRows
from raywgen.training.run_tokens import NONE
from raywgen.training.stored_weights import StoredWeights, part_reader
from raywgen.weights import KeyedNoise, Layout, Normalizer, NormalizerTable, WeightsError, Windows
from raywgen.weights.cache import cache_folder
from raywgen.weights.groups import groups_of, network_moments
from raywgen.weights.vector_file import fetch_vector, map_vector, write_vector

FOLDER = "moments"
"""The folder, within a run folder, of the moments of its checkpoints."""
_POLL_SECONDS = 0.2
# Values of small networks that are measured at once.
_VALUES_AT_ONCE = 1 << 20


class StoredMoments:
    """The moments of N checkpoints of one layout, mapped from the files of their shards.

    Args:
        layout: Layout of the checkpoints.
        per: What shares a scale, as `groups_of` takes it.
        files: Path or URI of each file.
        file_N: The file of each checkpoint, int64.
        place_N: Its place in the file, int64.
    """

    def __init__(self, layout: Layout, per: str, files: list[str], file_N: Tensor, place_N: Tensor) -> None:
        self._layout, self._per, self._files = layout, per, files
        self._file_N, self._place_N = file_N, place_N

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the mapped files out: who unpickles it maps them anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_mapped"}

    def of(self, index_B: Tensor, windows: Windows) -> Tensor:
        """Returns the moments of the windows' header chunks, float32 `(B, Y, K)`.

        Raises:
            WeightsError: A file is missing or damaged.
        """
        assert windows.header is not None
        index_BY, groups = windows.header.index_BY, groups_of(self._layout, self._per)
        place_BYK, is_there_BYK = groups.number_places(index_BY, windows.chunk_length)
        files = [self._mapped[file] for file in self._file_N[index_B].tolist()]
        places = zip(files, self._place_N[index_B].tolist(), place_BYK, strict=True)
        return torch.stack([file_NM[place][place_YK] for file_NM, place, place_YK in places]) * is_there_BYK

    @cached_property
    def _mapped(self) -> list[Tensor]:
        groups, counts = groups_of(self._layout, self._per), self._file_N.bincount().tolist()
        num_moments = groups.num_means + groups.num_groups
        return [
            _map(file, count * num_moments).view(count, num_moments)
            for file, count in zip(self._files, counts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Item:
    """The checkpoints of one shard, whose moments fill one file.

    Attributes:
        name: Name of the file, which changes with everything that it follows from.
        rows: The checkpoints that it is a part of.
        index_B: Which of them these are.
        per: What shares a scale.
    """

    name: str
    rows: LayoutRows
    index_B: Tensor
    per: str


def stage_moments(stages: Sequence[Stage], rows: RunRows) -> dict[str, str]:
    """Returns what shares a scale for each layout of which some stage needs moments, by the layout's id."""
    found = {}
    for stage in stages:
        for of_layout in [*rows.train, *rows.held]:
            windows = stage.windows(of_layout.layout, KeyedNoise(0, torch.zeros(1, dtype=torch.int64)))
            if windows is not None and windows.header is not None and stage.tokens == NONE:
                found[of_layout.layout.id] = windows.header.per
    return found


def with_moments(
    rows: RunRows,
    wanted: dict[str, str],
    corpus: Corpus,
    normalizers: NormalizerTable,
    out: str | Path,
    *,
    rank: int = 0,
    num_workers: int = 1,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> RunRows | None:
    """Measures the moments of a run's checkpoints together with its other workers, or finds those that are there.

    Workers wait for the files of all others; they need no collective operation, which would fail for lack of time.

    Args:
        rows: The checkpoints.
        wanted: The result of `stage_moments`.
        corpus: Their corpus.
        normalizers: The normalisers of its layouts, of which only the shared starts count.
        out: Run folder, which all workers reach.
        rank: This worker.
        num_workers: Number of workers.
        asked_to_stop: Whether to stop and go on another time.

    Returns:
        The checkpoints with their moments; None where this worker was asked to stop.

    Raises:
        WeightsError, CorpusError: A shard cannot be read, or a file cannot be written.
    """
    storage = Storage.at(joined(out, FOLDER))
    parts = [list(_items(of_layout, wanted, corpus, normalizers)) for of_layout in [*rows.train, *rows.held]]
    items = [item for part in parts for item in part]
    for item in items[rank::num_workers]:
        if asked_to_stop():
            return None
        if not storage.exists(item.name):
            _measure(item, normalizers[item.rows.layout.id][1], storage)
    while items := [item for item in items if not storage.exists(item.name)]:
        if asked_to_stop():
            return None
        time.sleep(_POLL_SECONDS)
    moments = [_stored(part, joined(out, FOLDER)) if part else None for part in parts]
    return rows.with_moments(moments)


def rows_with_moments(corpus: Corpus, generator: Generator, stages: Sequence[Stage], out: str | Path) -> RunRows:
    """Returns the checkpoints of a corpus with all that windows of some stages of a generator need.

    Args:
        corpus: The corpus.
        generator: The generator.
        stages: The stages.
        out: The folder for moments, if any are needed.
    """
    rows = RunRows.of(corpus)
    found = with_moments(rows, stage_moments(stages, rows), corpus, generator.normalizers, out)
    assert found is not None, "nobody asked to stop"
    return found


def _items(rows: LayoutRows, wanted: dict[str, str], corpus: Corpus, normalizers: NormalizerTable) -> Iterator[_Item]:
    """Yields an item for each shard of the checkpoints of a layout, if it needs moments."""
    layout = rows.layout
    if layout.id not in wanted:
        return
    assert isinstance(rows.weights, StoredWeights)
    per, sums = wanted[layout.id], {shard.path: shard.sha256 for shard in corpus.shards}
    start = ""
    if normalizers[layout.id][1].start_D is not None:
        (start,) = corpus.select(layout_id=layout.id, split="base").column("sha256").to_pylist()
    for path, row_B, index_B in rows.weights.by_shard():
        # The order of tensors is that of the flat vector.
        specs = [spec.to_json() for spec in layout.generated]
        content = json.dumps([per, sums[path], row_B.tolist(), specs, start], sort_keys=True)
        name = f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"
        yield _Item(name, rows, index_B, per)


def _measure(item: _Item, normalizer: Normalizer, storage: Storage) -> None:
    """Measures the moments of the checkpoints of a shard, and writes their file in one step."""
    layout, groups = item.rows.layout, groups_of(item.rows.layout, item.per)

    def parts() -> Iterator[Tensor]:
        for index_B in item.index_B.split(max(1, _VALUES_AT_ONCE // max(1, layout.num_values))):
            read = part_reader(item.rows.weights, index_B)
            yield network_moments(layout, item.per, normalizer, read).float().flatten()

    with storage.local_file(item.name) as path:
        write_vector(path, len(item.index_B) * (groups.num_means + groups.num_groups), parts())


def _stored(items: list[_Item], folder: str) -> StoredMoments:
    rows, per = items[0].rows, items[0].per
    file_N, place_N = torch.zeros(2, len(rows.weights), dtype=torch.int64)
    for file, item in enumerate(items):
        file_N[item.index_B], place_N[item.index_B] = file, torch.arange(len(item.index_B))
    return StoredMoments(rows.layout, per, [joined(folder, item.name) for item in items], file_N, place_N)


def _map(file: str, num_values: int) -> Tensor:
    """Maps a file of moments, of one at a URI a copy in this node's cache."""
    storage, name = Storage.around(file)
    path = Path(storage.path(name)) if storage.is_local else cache_folder() / FOLDER / name
    try:
        if not storage.is_local:
            fetch_vector(file, path)
        return map_vector(path, num_values)
    except WeightsError as error:
        raise WeightsError(
            f"{error}; or delete {file}, and give the same command again, which makes it anew"
        ) from error
