"""Checksums of checkpoints, which are compared once per opened corpus, when a checkpoint's weights are first used.

Every checkpoint has two. SHA-256 identifies equal checkpoints; XXH3, several times faster, detects changed bytes.
Corpora of older versions have only the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
_SLOW, _FAST = "sha256", "xxh3"


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
    """Returns both checksums of each row, by the names of their facts."""
    return [{_SLOW: sha256(row.data), _FAST: xxh3(row.data)} for row in packed_NP.numpy()]


class RowCheck:
    """Compares each checkpoint of a shard with its checksum, once.

    Args:
        sums: Checksum of each checkpoint, by row.
        digest: The function that computes them.
        failure: Creates the error to raise from a description.
    """

    def __init__(self, sums: Sequence[str], digest: Digest, failure: Callable[[str], Exception]) -> None:
        self._sums, self._digest, self._failure = sums, digest, failure
        self._is_whole_N = np.zeros(len(sums), dtype=bool)

    def unseen(self, row_N: np.ndarray) -> np.ndarray:
        """Returns the rows that were never compared, without repetition.

        Raises:
            CorpusError: The facts have fewer checkpoints.
        """
        if len(row_N) and row_N.max() >= len(self._sums):
            known = len(self._sums)
            raise self._failure(f"holds {row_N.max() + 1} checkpoints or more, of which the facts know {known}")
        new_N = row_N[~self._is_whole_N[row_N]]
        return np.unique(new_N) if len(new_N) else new_N

    def compare(self, row_N: np.ndarray, packed: Sequence[Tensor], ids: Sequence[str]) -> None:
        """Compares packed weights, one uint8 `(P,)` for each row; `ids` are those of all rows, for the message.

        Raises:
            CorpusError: A checkpoint has another checksum.
        """
        for row, found_P in zip(row_N, packed, strict=True):
            if self._digest(found_P.numpy().data) != self._sums[row]:
                raise self._failure(f"checkpoint '{ids[row]}' has another checksum than its facts")
            self._is_whole_N[row] = True


class Checksums:
    """The checksums in the facts of a corpus.

    Args:
        facts: The facts, one row a checkpoint.
    """

    def __init__(self, facts: pa.Table) -> None:
        is_fast = _FAST in facts.column_names and not facts.column(_FAST).null_count
        self._facts, self._name = facts, _FAST if is_fast else _SLOW
        self._digest = xxh3 if is_fast else sha256

    def check_of(self, shard: str, failure: Callable[[str], Exception]) -> RowCheck:
        """Returns the check of one shard's checkpoints."""
        of_shard = self._by_shard.get(shard)
        return RowCheck([] if of_shard is None else of_shard.column(self._name).to_pylist(), self._digest, failure)

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
        facts = self._facts.select(["shard", "row", self._name])
        facts = facts.sort_by([("shard", "ascending"), ("row", "ascending")])
        found, start = {}, 0
        for count in pc.value_counts(facts.column("shard")).to_pylist():
            found[count["values"]] = facts.slice(start, count["counts"])
            start += count["counts"]
        return found
