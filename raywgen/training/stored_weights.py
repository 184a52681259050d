"""Reads the weights of a run's checkpoints from the shards of its corpus, whole or a window of each.

Shards are memory-mapped, so the workers of a node share their pages and the system may drop them: what a worker keeps
does not grow with the number of checkpoints, nor, where it reads windows, with their size. Of a corpus that is opened
without copies, parts of shards are read where they lie, many at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import accumulate
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.corpus.at_once import networks_at_once
from raywgen.corpus.shards import WeightsView
from raywgen.weights import Layout, NonFiniteWeightsError
from raywgen.weights.groups import ReadValues

# Networks of more values are copied one by one, straight out of the mapped shard.
_LARGE = 1 << 16
# A request to an object store takes some ten milliseconds, whatever else is asked of it.
_REQUESTS_AT_ONCE = 32
_S = TypeVar("_S")
_T = TypeVar("_T")


class Weights(Protocol):
    """The flat vectors of N checkpoints of one layout."""

    def __len__(self) -> int: ...

    def values(self, index_B: Tensor) -> Tensor:
        """Returns whole flat vectors, float32 `(B, D)`."""
        ...

    def windows(self, index_B: Tensor, start_B: Tensor, length: int) -> Tensor:
        """Returns `length` consecutive values of each, float32 `(B, length)`; zeros beyond the ends of a network.

        Args:
            index_B: Checkpoints, int64.
            start_B: Position in the flat vector where each window begins, int64; it may be negative.
            length: Values of a window.
        """
        ...


class StoredWeights:
    """Checkpoints of a corpus; each is compared with its checksum when it is first used.

    Args:
        corpus: The corpus.
        layout: Their layout.
        facts: Their facts, in the order in which they are counted.
    """

    def __init__(self, corpus: Corpus, layout: Layout, facts: pa.Table) -> None:
        self._corpus, self._layout = corpus, layout
        shards = facts.column("shard").combine_chunks().dictionary_encode()
        self._paths: list[str] = shards.dictionary.to_pylist()
        self._shard_N = shards.indices.to_numpy(zero_copy_only=False)
        self._ids = facts.column("checkpoint_id")
        self._row_N = facts.column("row").to_numpy()

    def __len__(self) -> int:
        return len(self._row_N)

    def values(self, index_B: Tensor) -> Tensor:
        """Returns whole flat vectors, float32 `(B, D)`.

        Raises:
            MissingFileError, DamagedFileError: A shard cannot be read, or a checkpoint has changed.
            ChangedCorpusError: The corpus was deleted or rebuilt in the meantime.
        """
        index = index_B.numpy()
        # Opened first: what stays open of a shard must not lie behind a block in memory, or the allocator would never
        # use that memory for a block again.
        shards = np.unique(self._shard_N[index]).tolist()
        views = dict(zip(shards, self._each(self._view, shards), strict=True))
        out_BD = torch.empty(len(index), self._layout.num_values)

        def read(place: np.ndarray) -> None:
            form, view = views[int(self._shard_N[index[place[0]]])]
            if self._layout.num_values >= _LARGE:
                for each in place.tolist():
                    out_BD[each] = form.values(view.packed(int(self._row_N[index[each]])))
            else:
                out_BD[torch.from_numpy(place)] = form.values(view.rows(self._row_N[index[place]]))

        list(self._each(read, [np.flatnonzero(self._shard_N[index] == shard) for shard in shards]))
        self._check_finite(out_BD, index_B, torch.zeros_like(index_B))
        return out_BD

    def windows(self, index_B: Tensor, start_B: Tensor, length: int) -> Tensor:
        """Returns `length` consecutive values of each, as `Weights.windows` says; raises as `values` does."""
        out_BX = torch.zeros(len(index_B), length)

        def read(wanted: tuple[int, int]) -> Tensor:
            index, start = wanted
            form, view = self._view(int(self._shard_N[index]))
            read_ranges = partial(view.ranges, int(self._row_N[index]))
            return form.slice_values(read_ranges, max(0, start), max(0, min(length, start + length)))

        windows = self._each(read, zip(index_B.tolist(), start_B.tolist(), strict=True))
        for window_X, start, values in zip(out_BX, start_B.tolist(), windows, strict=True):
            first = min(length, max(0, -start))
            window_X[first : first + len(values)] = values
        self._check_finite(out_BX, index_B, start_B)
        return out_BX

    def by_shard(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields each shard's path in the corpus, and the rows in it and the numbers of the checkpoints that it has."""
        for shard, path in enumerate(self._paths):
            index = np.flatnonzero(self._shard_N == shard)
            yield path, torch.from_numpy(self._row_N[index].astype(np.int64)), torch.from_numpy(index)

    def paths(self, index_B: Tensor) -> list[str]:
        """Returns the shards that hold some checkpoints, by their paths in the corpus."""
        return [self._paths[shard] for shard in np.unique(self._shard_N[index_B.numpy()]).tolist()]

    def _each(self, read: Callable[[_S], _T], items: Iterable[_S]) -> Iterable[_T]:
        """Maps items, many at a time where each takes a request to an object store."""
        return map(read, items) if self._corpus.copies else _pool().map(read, items)

    def _check_finite(self, values_BX: Tensor, index_B: Tensor, start_B: Tensor) -> None:
        """Names the first checkpoint and tensor that hold NaN or infinity.

        Raises:
            NonFiniteWeightsError: There is one; the corpus was written by a program that did not check.
        """
        if bool(values_BX.isfinite().all()):
            return
        row, place = (~values_BX.isfinite()).nonzero()[0].tolist()
        stops = list(accumulate(spec.num_values for spec in self._layout.generated))
        spec = self._layout.generated[bisect_right(stops, int(start_B[row]) + place)]
        raise NonFiniteWeightsError(
            f"{self._corpus.location}: checkpoint {self._ids[int(index_B[row])].as_py()}: tensor '{spec.name}' holds "
            "NaN or infinity; leave the checkpoint out by `raywgen corpus filter`, or ingest it again, which sets it "
            "aside"
        )

    def _view(self, shard: int) -> tuple[Layout, WeightsView]:
        path = self._paths[shard]
        form = self._corpus.form(path)
        return form, self._corpus.view(path, form)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="raywgen-read")


def part_reader(weights: Weights, index_B: Tensor) -> ReadValues:
    """Returns what reads any part of some networks, float32 `(B, stop - start)`, all of a small one at once."""

    def read(start: int, stop: int) -> Tensor:
        return weights.windows(index_B, torch.full_like(index_B, start), stop - start)

    return read


def whole_blocks(weights: Weights, num_values: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields all networks, some after another, so that memory does not grow with their number.

    Args:
        weights: The networks.
        num_values: D, the values of each.

    Yields:
        The places of B networks among `weights`, int64 `(B,)`, and their flat vectors `(B, D)`.
    """
    for index_B in torch.arange(len(weights)).split(networks_at_once(num_values)):
        yield index_B, weights.values(index_B)
