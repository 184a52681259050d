"""Checksums of checkpoints, which are compared once per opened corpus, when weights are first used.

Every checkpoint has two. SHA-256 identifies equal checkpoints; XXH3, several times faster, detects changed bytes.
A checkpoint of several pages also has the XXH3 of each page, so that a window of it is used when its own pages are
compared. Corpora of older versions have only the first, or no checksums of pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import xxhash
from torch import Tensor

# Arrow creates these functions at import, so no type checker sees them.
pc: Any = pyarrow.compute
Digest = Callable[[memoryview], str]
PageSums = Callable[[str], bytes | None]
"""Returns the checksums of a checkpoint's pages, joined, by its id; None where they are not known."""
PAGE_BYTES = 1 << 20
PAGE_SUMS = "xxh3_pages"
"""Key of the checksums of pages among the facts of a checkpoint that is not committed yet."""
_SLOW, _FAST = "sha256", "xxh3"
_SUM_BYTES = 8


def sha256(content: memoryview) -> str:
    """Returns the SHA-256 digest as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def xxh3(content: memoryview) -> str:
    """Returns the XXH3 digest as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(content)


def row_sums(packed_NP: Tensor) -> list[str]:
    """Returns the SHA-256 digest of each row."""
    return [sha256(row.data) for row in packed_NP.numpy()]


def row_facts(packed_NP: Tensor) -> list[dict[str, str]]:
    """Returns all checksums of each row, by the names of their facts."""
    return [_row_facts(row.data) for row in packed_NP.numpy()]


def _row_facts(content: memoryview) -> dict[str, str]:
    if len(content) <= PAGE_BYTES:
        return {_SLOW: sha256(content), _FAST: xxh3(content)}
    slow, fast, pages = hashlib.sha256(), xxhash.xxh3_64(), []
    # Page by page, so that each is read from memory once.
    for page in _pages(content):
        slow.update(page)
        fast.update(page)
        pages.append(xxh3(page))
    return {_SLOW: slow.hexdigest(), _FAST: fast.hexdigest(), PAGE_SUMS: "".join(pages)}


def page_sums(content: memoryview) -> bytes:
    """Returns the XXH3 digests of the pages of a checkpoint, joined."""
    return b"".join(xxhash.xxh3_64_digest(page) for page in _pages(content))


def _pages(content: memoryview) -> Iterator[memoryview]:
    return (content[start : start + PAGE_BYTES] for start in range(0, len(content), PAGE_BYTES))


_DIGESTS: dict[Digest, Callable[[], Any]] = {sha256: hashlib.sha256, xxh3: xxhash.xxh3_64}


class RowCheck:
    """Compares each checkpoint of a shard with its checksum, once.

    Args:
        sums: Checksum of each checkpoint, by row.
        digest: The function that computes them.
        failure: Creates the error to raise from a description.
        ids: Id of each checkpoint, by row.
        page_sums: Returns the checksums of a checkpoint's pages.
    """

    def __init__(
        self,
        sums: Sequence[str],
        digest: Digest,
        failure: Callable[[str], Exception],
        ids: Sequence[str],
        page_sums: PageSums,
    ) -> None:
        self._sums, self._digest, self._failure = sums, digest, failure
        self.ids, self._page_sums = ids, page_sums
        self._is_whole_N = np.zeros(len(sums), dtype=bool)
        self._seen_pages: dict[int, set[int]] = {}

    def unseen(self, row_N: np.ndarray) -> np.ndarray:
        """Returns the rows that were never compared, without repetition.

        Raises:
            CorpusError: The facts have fewer checkpoints.
        """
        if len(row_N):
            self._check_known(int(row_N.max()))
        new_N = row_N[~self._is_whole_N[row_N]]
        return np.unique(new_N) if len(new_N) else new_N

    def _check_known(self, row: int) -> None:
        if row >= (known := len(self._sums)):
            raise self._failure(f"holds {row + 1} checkpoints or more, of which the facts know {known}")

    def compare(self, row_N: np.ndarray, packed: Sequence[Tensor], ids: Sequence[str]) -> None:
        """Compares packed weights, one uint8 `(P,)` for each row; `ids` are those of all rows, for the message.

        Raises:
            CorpusError: A checkpoint has another checksum.
        """
        for row, found_P in zip(row_N, packed, strict=True):
            if self._digest(found_P.numpy().data) != self._sums[row]:
                raise self._failure(f"checkpoint '{ids[row]}' has another checksum than its facts")
            self._is_whole_N[row] = True

    def compare_stream(self, row: int, blocks: Iterable[memoryview]) -> None:
        """Compares a checkpoint that comes in blocks; raises as `compare` does."""
        digest = _DIGESTS[self._digest]()
        for block in blocks:
            digest.update(block)
        if digest.hexdigest() != self._sums[row]:
            raise self._failure(f"checkpoint '{self.ids[row]}' has another checksum than its facts")
        self._is_whole_N[row] = True

    def knows_pages(self, row: int) -> bool:
        """Whether there are checksums of a checkpoint's pages."""
        return self._page_sums(self.ids[row]) is not None

    def unseen_pages(self, row: int, ranges: Sequence[tuple[int, int]]) -> list[int] | None:
        """Returns which pages that hold these bytes of a checkpoint were never compared, in order.

        None means that the corpus knows no pages of a checkpoint that was never compared: it is compared as a whole.
        """
        self._check_known(row)
        if self._is_whole_N[row]:
            return []
        if not self.knows_pages(row):
            return None
        return sorted(set(pages_of(ranges)) - self._seen_pages.get(row, set()))

    def compare_page(self, row: int, page: int, content: memoryview) -> None:
        """Compares a page of a checkpoint.

        Raises:
            CorpusError: The page has another checksum.
        """
        sums = self._page_sums(self.ids[row]) or b""
        if xxhash.xxh3_64_digest(content) != sums[page * _SUM_BYTES : (page + 1) * _SUM_BYTES]:
            raise self._failure(
                f"checkpoint '{self.ids[row]}' has another checksum than its facts in bytes {page * PAGE_BYTES} to "
                f"{page * PAGE_BYTES + len(content) - 1}"
            )
        self._seen_pages.setdefault(row, set()).add(page)


def pages_of(ranges: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Yields the pages that hold these bytes of a checkpoint; each range is its first byte and its end."""
    for first, end in ranges:
        yield from range(first // PAGE_BYTES, -(-end // PAGE_BYTES))


class Checksums:
    """The checksums in the facts of a corpus.

    Args:
        facts: The facts, one row a checkpoint.
        page_sums: Returns the checksums of a checkpoint's pages.
    """

    def __init__(self, facts: pa.Table, page_sums: PageSums) -> None:
        self._page_sums = page_sums
        is_fast = _FAST in facts.column_names and not facts.column(_FAST).null_count
        self._facts, self._name = facts, _FAST if is_fast else _SLOW
        self._digest = xxh3 if is_fast else sha256

    def check_of(self, shard: str, failure: Callable[[str], Exception]) -> RowCheck:
        """Returns the check of one shard's checkpoints."""
        of_shard = self._by_shard.get(shard)
        names = (self._name, "checkpoint_id")
        sums, ids = ([] if of_shard is None else of_shard.column(name).to_pylist() for name in names)
        return RowCheck(sums, self._digest, failure, ids, self._page_sums)

    def first_changed(self, ids: Sequence[str], packed_NP: Tensor) -> str | None:
        """Returns the first of these checkpoints whose bytes have changed, or None."""
        for checkpoint_id, row in zip(ids, packed_NP.numpy(), strict=True):
            if self._by_id.get(checkpoint_id) != self._digest(row.data):
                return checkpoint_id
        return None

    @cached_property
    def _by_id(self) -> dict[str, str]:
        return dict(zip(*(self._facts.column(name).to_pylist() for name in ("checkpoint_id", self._name)), strict=True))

    @cached_property
    def _by_shard(self) -> dict[str, pa.Table]:
        """The facts of each shard, by row."""
        facts = self._facts.select(["shard", "row", "checkpoint_id", self._name])
        facts = facts.sort_by([("shard", "ascending"), ("row", "ascending")])
        found, start = {}, 0
        for count in pc.value_counts(facts.column("shard")).to_pylist():
            found[count["values"]] = facts.slice(start, count["counts"])
            start += count["counts"]
        return found
