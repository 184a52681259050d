"""Arrow IPC shards of weights: checkpoints of one layout and one split.

A small checkpoint is one row, a large one several: pages of at most 64 Ki values, of which the last may be shorter.
The pages of a checkpoint are contiguous, so it can be viewed as a whole without a copy.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raywgen.corpus.arrow_file import check_uncompressed
from raywgen.corpus.checksums import PAGE_BYTES, RowCheck, row_facts
from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError
from raywgen.corpus.facts import CheckpointFacts
from raywgen.corpus.storage import CorpusStorage
from raywgen.weights import Layout, NonFiniteWeightsError
from raywgen.weights.tensors import real_values

WEIGHTS = "weights"
_CHECKPOINTS_PER_BATCH = 512
_BATCH_BYTES = 1 << 30
_VALUES_PER_PAGE = 1 << 16
_SCHEMA = pa.schema([("checkpoint_id", pa.string()), ("packed", pa.large_binary())])


def page_bytes(layout: Layout) -> int:
    """Returns the number of bytes of a page of this layout's checkpoints."""
    return _VALUES_PER_PAGE * min(spec.torch_dtype.itemsize for spec in layout.tensors)


def num_pages(layout: Layout) -> int:
    """Returns the number of pages, and so of rows, of one checkpoint."""
    return max(1, -(-layout.num_bytes // page_bytes(layout)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A shard as the manifest names it, with the facts of its checkpoints until they are committed.

    `num_rows` counts pages. `form_id` names the form in which it stores its checkpoints; it is empty if that is the
    form of the corpus' network.
    """

    path: str
    layout_id: str
    num_rows: int
    num_bytes: int
    sha256: str
    form_id: str = ""
    facts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object of the manifest, without facts, which go to Parquet."""
        return {
            "path": self.path,
            "layout_id": self.layout_id,
            "num_rows": self.num_rows,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
            **({"form_id": self.form_id} if self.form_id else {}),
        }


def write_shard(
    root: str,
    name: str,
    layout: Layout,
    facts: Sequence[CheckpointFacts],
    packed_NP: Tensor,
    *,
    is_finite: bool = False,
) -> Shard:
    """Writes N checkpoints of one layout; may run anywhere, `commit_corpus` makes the shard part of a corpus.

    Args:
        root: Path or URI of the corpus.
        name: Name of the shard, without suffix.
        layout: Layout of all checkpoints.
        facts: Facts of the N checkpoints.
        packed_NP: Packed weights uint8, from `Layout.pack`.
        is_finite: Whether the caller has checked for NaN and infinity.

    Raises:
        CorpusError: Facts and weights do not fit each other or the layout, or the file cannot be written.
        NonFiniteWeightsError: A checkpoint holds NaN or infinity; it is named.
    """
    if packed_NP.shape != (len(facts), layout.num_bytes) or packed_NP.dtype != torch.uint8:
        raise CorpusError(
            f"shard {name}: packed weights are {packed_NP.dtype}{list(packed_NP.shape)}, facts and layout ask for "
            f"uint8[{len(facts)}, {layout.num_bytes}]; pack every checkpoint by this layout"
        )
    if len(splits := sorted({row.split for row in facts})) > 1:
        raise CorpusError(f"shard {name}: it mixes the splits {', '.join(splits)}; write one shard for each")
    if wrong := [row.checkpoint_id for row in facts if row.layout_id != layout.id]:
        raise CorpusError(f"shard {name}: checkpoint {wrong[0]} is not of layout {layout.id}; write it apart")
    if not is_finite:
        _check_finite(layout, facts, packed_NP)
    packed_NP = packed_NP.contiguous()
    path = f"{WEIGHTS}/{name}.arrow"
    ids = [row.checkpoint_id for row in facts]
    with ThreadPoolExecutor(1) as beside:
        sums = beside.submit(row_facts, packed_NP)
        sha256, num_bytes = CorpusStorage.at(root).write_stream(
            path, lambda sink: _write_ipc(sink, ids, packed_NP, layout)
        )
    rows = [
        {
            **row.to_row(),
            "dtype": layout.dtype,
            **digests,
            "num_values": layout.num_values,
            "shard": path,
            "row": index,
        }
        for index, (row, digests) in enumerate(zip(facts, sums.result(), strict=True))
    ]
    return Shard(
        path=path,
        layout_id=layout.id,
        num_rows=len(facts) * num_pages(layout),
        num_bytes=num_bytes,
        sha256=sha256,
        form_id=layout.form_id,
        facts=rows,
    )


def read_shard(storage: CorpusStorage, path: str) -> pa.Table:
    """Reads all rows of a shard, without a copy if the file is local.

    Raises:
        MissingFileError: The file is missing.
        DamagedFileError: The file is truncated or no Arrow file.
    """
    with _naming(storage, path):
        return _checked(_open(storage, path).read_all())


def read_block(storage: CorpusStorage, path: str, layout_id: str, index: int) -> pa.Table:
    """Reads one record batch of a shard, with the layout's id as a third column; raises as `read_shard` does."""
    with _naming(storage, path):
        batch = _open(storage, path).get_batch(index)
        table = _checked(pa.Table.from_batches([batch]))
        return table.append_column("layout_id", pa.repeat(pa.scalar(layout_id), table.num_rows))


def num_blocks(storage: CorpusStorage, path: str) -> int:
    """Returns the number of record batches of a shard; raises as `read_shard` does."""
    with _naming(storage, path), storage.open(path) as file:
        return pa.ipc.open_file(file).num_record_batches


def _open(storage: CorpusStorage, path: str) -> pa.RecordBatchFileReader:
    file = storage.open(path)
    check_uncompressed(file)
    return pa.ipc.open_file(file)


@contextmanager
def _naming(storage: CorpusStorage, path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{storage.name}/{path} is truncated or no Arrow file ({error}); {RESTORE}") from error


def _checked(table: pa.Table) -> pa.Table:
    """Refuses tables that Arrow would read out of bounds; weights are checked when they become a tensor."""
    if table.schema != _SCHEMA:
        raise pa.ArrowInvalid(f"columns are {table.schema.names}")
    table.column("checkpoint_id").validate(full=True)
    return table


def packed_tensor(block: pa.Table, layout: Layout) -> Tensor:
    """Returns packed weights uint8 `(N, P)` of a table; a read-only view if it is a single record batch.

    Raises:
        DamagedFileError: A row has another length than the layout requires.
    """
    pages = num_pages(layout)
    parts = [_packed_chunk(chunk, layout, pages) for chunk in block.column("packed").chunks if len(chunk)]
    if not parts:
        return torch.empty(0, layout.num_bytes, dtype=torch.uint8)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def checkpoint_ids(block: pa.Table, layout: Layout) -> list[str]:
    """Returns the id of each checkpoint in a table, once for all its pages."""
    return block.column("checkpoint_id").to_pylist()[:: num_pages(layout)]


def _packed_chunk(chunk: pa.LargeBinaryArray, layout: Layout, pages: int) -> Tensor:
    num, width = len(chunk) // pages, layout.num_bytes
    _, offset_buffer, data = chunk.buffers()
    last = chunk.offset + len(chunk)
    if offset_buffer is None or offset_buffer.size < 8 * (last + 1) or len(chunk) % pages:
        raise DamagedFileError(f"the lengths of {num} checkpoints are cut short; {RESTORE}")
    offsets = np.frombuffer(offset_buffer, dtype=np.int64, count=last + 1)[chunk.offset :]
    start = int(offsets[0])
    if not np.array_equal(offsets[1:] - start, _page_ends(num, layout)):
        raise DamagedFileError(f"a checkpoint is not {width} bytes long as its layout asks; {RESTORE}")
    if start < 0 or start + num * width > (0 if data is None else data.size):
        raise DamagedFileError(f"checkpoints reach beyond the end of their file; {RESTORE}")
    if num * width == 0:
        return torch.empty(num, width, dtype=torch.uint8)
    # Through DLPack, because torch warns of read-only NumPy arrays: a view of a shard is never written to.
    flat = pa.Array.from_buffers(pa.uint8(), num * width, [None, data], offset=start)
    return torch.from_dlpack(flat).view(num, width)


def _check_finite(layout: Layout, facts: Sequence[CheckpointFacts], packed_NP: Tensor) -> None:
    state = layout.unpack(packed_NP)
    for name in (spec.name for spec in layout.generated):
        tensor = real_values(state[name])
        finite = torch.isfinite(tensor if tensor.dtype == torch.float64 else tensor.float())
        bad_N = ~finite.reshape(len(facts), math.prod(tensor.shape[1:])).all(dim=1)
        if bool(bad_N.any()):
            checkpoint = facts[int(bad_N.nonzero()[0])].checkpoint_id
            raise NonFiniteWeightsError(
                f"checkpoint {checkpoint}: tensor '{name}' holds NaN or infinity; drop this checkpoint"
            )


def _page_ends(num: int, layout: Layout) -> np.ndarray:
    """Returns the end of each row of `num` checkpoints, int64, in bytes from the start of the first."""
    ends = np.minimum(np.arange(1, num_pages(layout) + 1) * page_bytes(layout), layout.num_bytes)
    return (np.arange(num)[:, None] * layout.num_bytes + ends).reshape(-1)


def _write_ipc(sink: Any, checkpoint_ids: list[str], packed_NP: Tensor, layout: Layout) -> None:
    pages = num_pages(layout)
    per_batch = max(1, min(_CHECKPOINTS_PER_BATCH, _BATCH_BYTES // max(1, layout.num_bytes)))
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        for start in range(0, len(packed_NP), per_batch):
            rows = packed_NP[start : start + per_batch].numpy()
            offsets = np.concatenate([[0], _page_ends(len(rows), layout)])
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(rows)]
            column = pa.Array.from_buffers(pa.large_binary(), len(rows) * pages, buffers)
            ids = np.repeat(np.array(checkpoint_ids[start : start + per_batch], dtype=object), pages)
            writer.write_batch(pa.record_batch([pa.array(ids, pa.string()), column], schema=_SCHEMA))


class WeightsView(ABC):
    """The weights of an opened shard; what is used of them is compared with checksums."""

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """Ids of the checkpoints by row."""

    @abstractmethod
    def packed(self, row: int) -> Tensor:
        """Returns the bytes uint8 `(P,)` of a checkpoint, which are not to be written to.

        Raises:
            DamagedFileError: The checkpoint has changed since it was written.
        """

    @abstractmethod
    def rows(self, row_N: np.ndarray) -> Tensor:
        """Copies checkpoints to `(N, P)`; raises as `packed` does."""

    @abstractmethod
    def ranges(self, row: int, ranges: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Returns some bytes of a checkpoint, each uint8; only the pages that hold them are checked.

        Args:
            row: The checkpoint.
            ranges: The first byte and the end of each.

        Raises:
            DamagedFileError: A page has changed since it was written.
        """


class ShardView(WeightsView):
    """A view of a mapped shard's weights without a copy; every checkpoint is checked before its first use.

    Args:
        table: The whole shard.
        layout: Layout of its checkpoints.
        check: Compares checkpoints with their checksums.

    Raises:
        DamagedFileError: A row has another length than the layout requires.
    """

    def __init__(self, table: pa.Table, layout: Layout, check: RowCheck) -> None:
        pages = num_pages(layout)
        self._ids = checkpoint_ids(table, layout)
        chunks = [chunk for chunk in table.column("packed").chunks if len(chunk)]
        self._parts_NP = [_packed_chunk(chunk, layout, pages) for chunk in chunks]
        self._ends = np.cumsum([len(part) for part in self._parts_NP])
        self.row_bytes = layout.num_bytes
        self._check = check

    @property
    def ids(self) -> list[str]:
        """Ids of the checkpoints by row, as the shard holds them."""
        return self._ids

    def _checked(self, row_N: np.ndarray) -> None:
        """Checks the rows that were never checked before.

        Raises:
            DamagedFileError: A checkpoint has changed since it was written.
        """
        if len(new := self._check.unseen(row_N)):
            self._check.compare(new, [self._packed(int(row)) for row in new], self.ids)

    def packed(self, row: int) -> Tensor:
        """Returns the bytes uint8 `(P,)` of a checkpoint as a view."""
        self._checked(np.array([row]))
        return self._packed(row)

    def ranges(self, row: int, ranges: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Returns some bytes of a checkpoint as views, as `WeightsView.ranges` says."""
        packed_P = self._packed(row)
        pages = self._check.unseen_pages(row, ranges)
        if pages is None:
            self._checked(np.array([row]))
        for page in pages or ():
            self._check.compare_page(row, page, packed_P[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].numpy().data)
        return [packed_P[first:end] for first, end in ranges]

    def _packed(self, row: int) -> Tensor:
        part = int(np.searchsorted(self._ends, row, side="right"))
        return self._parts_NP[part][row - (self._ends[part - 1] if part else 0)]

    def rows(self, row_N: np.ndarray) -> Tensor:
        """Copies checkpoints to `(N, P)`."""
        self._checked(row_N)
        out = torch.empty(len(row_N), self.row_bytes, dtype=torch.uint8)
        part_N = np.searchsorted(self._ends, row_N, side="right")
        for part in np.unique(part_N):
            (place,) = np.nonzero(part_N == part)
            first = self._ends[part - 1] if part else 0
            out[torch.from_numpy(place)] = self._parts_NP[part][torch.from_numpy(row_N[place] - first)]
        return out

    def parts(self, row_B: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, Tensor]]:
        """Splits ascending rows by the record batches that hold them.

        Yields:
            The ends of a part of `row_B`, its rows within the record batch, and all bytes of that batch, flat.

        Raises:
            DamagedFileError: A checkpoint has changed since it was written.
        """
        self._checked(row_B)
        edges = np.searchsorted(row_B, self._ends)
        for part, (first, last) in enumerate(pairwise((0, *edges.tolist()))):
            if first < last:
                before = self._ends[part - 1] if part else 0
                yield first, last, row_B[first:last] - before, self._parts_NP[part].view(-1)
