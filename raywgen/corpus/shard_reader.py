"""Reads weights from the shards of an opened corpus, and compares each checkpoint with its facts when it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from raywgen.corpus.cache import local_copy
from raywgen.corpus.checksums import Checksums, PageSums, RowCheck
from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError, MissingFileError
from raywgen.corpus.manifest import cause
from raywgen.corpus.remote_view import RemoteView
from raywgen.corpus.shards import (
    WEIGHTS,
    Shard,
    ShardView,
    WeightsView,
    checkpoint_ids,
    num_blocks,
    packed_tensor,
    read_block,
    read_shard,
)
from raywgen.corpus.storage import CorpusStorage
from raywgen.weights import Layout

# Mapping a shard again costs a page fault per 16 pages; a shard that stays mapped costs a file descriptor.
_OPENED_SHARDS = 512


class ShardReader:
    """Reads shards; the most recently used ones stay open.

    Args:
        storage: The corpus' folder.
        manifest: The manifest that was read, by which a rebuilt corpus is distinguished from a damaged one.
        facts: The facts, one row a checkpoint.
        page_sums: Returns the checksums of a checkpoint's pages.
        copies: Whether shards are mapped, of remote ones a copy; else parts of them are read where they lie.
    """

    def __init__(
        self,
        storage: CorpusStorage,
        manifest: dict[str, Any],
        facts: pa.Table,
        page_sums: PageSums,
        *,
        copies: bool = True,
    ) -> None:
        self._storage, self._manifest, self._facts = storage, manifest, facts
        self._page_sums, self._copies = page_sums, copies
        self._opened: dict[str, WeightsView] = {}
        self._opening = threading.Lock()
        self._checks: dict[tuple[str, object], RowCheck] = {}

    def rows(self, shard: Shard, row_N: np.ndarray, id_N: np.ndarray, layout: Layout) -> Tensor:
        """Copies rows `(N, P)` of a shard, after checking their ids; raises as `view` does."""
        view = self.view(shard, layout)
        stored = np.array(view.ids, dtype=object)
        if len(stored) <= row_N.max() or (stored[row_N] != id_N).any():
            raise self._failure(shard.path, f"does not hold checkpoint '{id_N[0]}' and others where the facts say")
        # Rows of a tensor, not of the table: Arrow would copy by stored offsets, which it does not check.
        return view.rows(row_N)

    def row(self, shard: Shard, row: int, checkpoint_id: str, layout: Layout) -> Tensor:
        """Returns one row `(P,)` of a shard as a view, after checking its id; raises as `view` does."""
        view = self.view(shard, layout)
        if len(view.ids) <= row or view.ids[row] != checkpoint_id:
            raise self._failure(shard.path, f"does not hold checkpoint '{checkpoint_id}' where the facts say")
        return view.packed(row)

    def view(self, shard: Shard, layout: Layout) -> WeightsView:
        """Returns a view of a shard's weights; the most recently used ones stay open. Threads may call it.

        Raises:
            MissingFileError, DamagedFileError: The shard cannot be read.
            ChangedCorpusError: The corpus was deleted or rebuilt in the meantime.
        """
        path = shard.path
        with self._opening:
            if path in self._opened:
                self._opened[path] = self._opened.pop(path)
                return self._opened[path]
        view = self._mapped(shard, layout) if self._copies else self._remote(shard, layout)
        with self._opening:
            self._opened[path] = view
            if len(self._opened) > _OPENED_SHARDS:
                del self._opened[next(iter(self._opened))]
        return view

    def _mapped(self, shard: Shard, layout: Layout) -> ShardView:
        path = shard.path
        try:
            return ShardView(read_shard(*local_copy(self._storage, shard)), layout, self._row_check(path))
        except MissingFileError as error:
            raise self._cause(error) from error
        except DamagedFileError as error:
            raise self._cause(DamagedFileError(f"{self._storage.name}/{path}: {error}")) from error

    def _remote(self, shard: Shard, layout: Layout) -> RemoteView:
        path = shard.path
        try:
            return RemoteView(self._storage.open(path), layout, self._row_check(path), partial(self._unreadable, path))
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(path, f"is truncated or no Arrow file ({error}); {RESTORE}", error) from error
        except CorpusError as error:
            raise self._cause(error) from error

    def _unreadable(self, path: str, reason: str, error: Exception | None) -> CorpusError:
        """Returns the error for a shard that cannot be read where it lies, which may have been lost meanwhile."""
        name = f"{self._storage.name}/{path}"
        if error is not None and self._storage.size(path) is None:
            return self._cause(MissingFileError(f"{name} is missing; {RESTORE}"))
        return self._cause(DamagedFileError(f"{name} {reason}"))

    def checked_block(self, block: pa.Table, form: Callable[[str], Layout]) -> tuple[list[str], Layout, Tensor]:
        """Returns ids, form and packed weights uint8 `(N, P)` of a block.

        Args:
            block: A block of `blocks`, or of the corpus' Ray Data set.
            form: Returns the form of a shard's checkpoints by its path.

        Raises:
            DamagedFileError: A checkpoint's bytes have changed since they were written.
            ChangedCorpusError: The corpus was deleted or rebuilt in the meantime.
        """
        first = block.column("checkpoint_id")[0].as_py()
        if first not in self._shard_of:
            raise self._failure(WEIGHTS, f"holds a checkpoint '{first}' that is not among the facts")
        layout = form(self._shard_of[first])
        ids, packed_NP = checkpoint_ids(block, layout), packed_tensor(block, layout)
        if (changed := self._checksums.first_changed(ids, packed_NP)) is not None:
            raise self._failure(WEIGHTS, f"checkpoint '{changed}' has another checksum than its facts")
        return ids, layout, packed_NP

    def blocks(self, shard: Shard) -> Iterator[pa.Table]:
        """Yields the record batches of a shard; raises as `view` does."""
        try:
            for index in range(num_blocks(self._storage, shard.path)):
                yield read_block(self._storage, shard.path, shard.layout_id, index)
        except (DamagedFileError, MissingFileError) as error:
            raise self._cause(error) from error

    @cached_property
    def _checksums(self) -> Checksums:
        return Checksums(self._facts, self._page_sums)

    @cached_property
    def _shard_of(self) -> dict[str, str]:
        """Checkpoint id -> path of its shard."""
        return dict(zip(*(self._facts.column(name).to_pylist() for name in ("checkpoint_id", "shard")), strict=True))

    def _row_check(self, path: str) -> RowCheck:
        """Returns the check of a shard, the same one as long as the file is unchanged: nothing is compared twice."""
        key = path, self._storage.version(path)
        if key not in self._checks:
            self._checks[key] = self._checksums.check_of(path, partial(self._failure, path))
        return self._checks[key]

    def _failure(self, path: str, reason: str) -> CorpusError:
        return self._cause(DamagedFileError(f"{self._storage.name}/{path}: {reason}; {RESTORE}"))

    def _cause(self, error: CorpusError) -> CorpusError:
        return cause(error, self._storage, self._manifest)
