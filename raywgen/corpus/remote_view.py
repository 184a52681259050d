"""Reads weights out of a shard where it lies, by ranges of its bytes: no copy of the shard is made.

What is used of a checkpoint is compared with the checksums of the pages that hold it. Where a corpus knows no checksums
of pages, all of a large checkpoint is read once, before its first use, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raywgen.corpus.arrow_file import BodyPart, data_parts
from raywgen.corpus.checksums import PAGE_BYTES, RowCheck, pages_of
from raywgen.corpus.errors import RESTORE
from raywgen.corpus.shards import WeightsView
from raywgen.weights import Layout

# A request to an object store takes as long as reading this much.
_GAP_BYTES = 1 << 18
_READ_BYTES = 8 << 20
_PACKED = 1
"""The column of packed weights in a shard."""


class RemoteView(WeightsView):
    """The weights of a shard that is neither mapped nor copied.

    Args:
        file: The shard, opened for random access.
        layout: Layout of its checkpoints.
        check: Compares checkpoints and pages with their checksums.
        failure: Creates the error to raise from a description and its cause.

    Raises:
        pyarrow.ArrowException: The file is no Arrow file.
    """

    def __init__(
        self, file: pa.NativeFile, layout: Layout, check: RowCheck, failure: Callable[[str, OSError | None], Exception]
    ) -> None:
        self._file, self._check, self._failure = file, check, failure
        self.row_bytes = layout.num_bytes
        self._parts: list[BodyPart] = data_parts(file, _PACKED)
        self._ends = np.cumsum([part.num_bytes // max(1, self.row_bytes) for part in self._parts])

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the checkpoints by row, as the facts know them."""
        return self._check.ids

    def packed(self, row: int) -> Tensor:
        """Reads the bytes uint8 `(P,)` of a checkpoint."""
        return self.rows(np.array([row]))[0]

    def rows(self, row_N: np.ndarray) -> Tensor:
        """Reads checkpoints `(N, P)`; those that lie close to each other by one request."""
        self._check.unseen(row_N)
        starts = [self._start(int(row)) for row in row_N]
        content = self._read([(start, start + self.row_bytes) for start in starts])
        out_NP = torch.stack(content) if content else torch.empty(0, self.row_bytes, dtype=torch.uint8)
        self._check.compare(row_N, list(out_NP), self.ids)
        return out_NP

    def ranges(self, row: int, ranges: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Reads the pages that hold some bytes of a checkpoint, and returns these bytes, as `WeightsView.ranges`."""
        start = self._start(row)
        if self.row_bytes > PAGE_BYTES and not self._check.knows_pages(row):
            if len(self._check.unseen(np.array([row]))):
                self._check.compare_stream(row, self._blocks(start))
            return self._read([(start + first, start + end) for first, end in ranges])
        if self.row_bytes <= PAGE_BYTES:
            packed_P = self.packed(row)
            return [packed_P[first:end] for first, end in ranges]
        pages = sorted(set(pages_of(ranges)))
        spans = [(page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, self.row_bytes)) for page in pages]
        content = self._read([(start + first, start + end) for first, end in spans])
        for page, found in zip(pages, content, strict=True):
            self._check.compare_page(row, page, found.numpy().data)
        at = {page: index for index, page in enumerate(pages)}
        return [_cut(content, at, first, end) for first, end in ranges]

    def _start(self, row: int) -> int:
        """Returns where a checkpoint begins in the file."""
        part = int(np.searchsorted(self._ends, row, side="right"))
        if part == len(self._parts):
            raise self._failure(
                f"holds {int(self._ends[-1]) if len(self._ends) else 0} checkpoints, not {row + 1}", None
            )
        return self._parts[part].start + (row - (int(self._ends[part - 1]) if part else 0)) * self.row_bytes

    def _blocks(self, start: int) -> Iterator[memoryview]:
        """Yields a checkpoint in blocks."""
        for first in range(0, self.row_bytes, _READ_BYTES):
            yield self._at(start + first, start + min(first + _READ_BYTES, self.row_bytes)).numpy().data

    def _read(self, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Reads parts of the file, each uint8, with few requests."""
        found: dict[tuple[int, int], Tensor] = {}
        for run in _runs(sorted(set(spans))):
            first, end = run[0][0], max(end for _, end in run)
            content = self._at(first, end)
            found |= {span: content[span[0] - first : span[1] - first] for span in run}
        return [found[span] for span in spans]

    def _at(self, first: int, end: int) -> Tensor:
        try:
            content = self._file.read_at(end - first, first)
        except OSError as error:
            raise self._failure(f"cannot be read ({error}); {RESTORE}", error) from error
        if len(content) != end - first:
            raise self._failure(f"ends at byte {first + len(content)}, within a checkpoint; {RESTORE}", None)
        flat = pa.Array.from_buffers(pa.uint8(), len(content), [None, pa.py_buffer(content)])
        # Through DLPack, because torch warns of read-only memory: what is read is never written to.
        return torch.from_dlpack(flat) if len(content) else torch.empty(0, dtype=torch.uint8)


def _runs(spans: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Groups ascending spans that are read by one request."""
    run: list[tuple[int, int]] = []
    for span in spans:
        if run and (span[0] > run[-1][1] + _GAP_BYTES or span[1] > run[0][0] + _READ_BYTES):
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def _cut(content: Sequence[Tensor], at: dict[int, int], first: int, end: int) -> Tensor:
    """Returns bytes of a checkpoint out of its pages."""
    pages = range(first // PAGE_BYTES, -(-end // PAGE_BYTES))
    if not pages:
        return torch.empty(0, dtype=torch.uint8)
    parts = [content[at[page]] for page in pages]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined[first - pages[0] * PAGE_BYTES : end - pages[0] * PAGE_BYTES]
