"""Cuts work on many rows into passes, whose intermediate results stay near a core or fit into memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_most_passes = sys.maxsize


def rows_of_a_pass(num_rows: int, numbers_of_a_row: int, most_numbers: int) -> int:
    """Returns how many rows a pass takes, at least 1.

    Args:
        num_rows: Rows of the whole work.
        numbers_of_a_row: Intermediate numbers that a row needs.
        most_numbers: Intermediate numbers of a pass.
    """
    return max(1, most_numbers // max(1, numbers_of_a_row), -(-num_rows // _most_passes))


@contextmanager
def few_passes(most: int = 4) -> Iterator[None]:
    """Takes work in a few passes, for tensors without values, where only the number of operations takes time."""
    global _most_passes
    before, _most_passes = _most_passes, most
    try:
        yield
    finally:
        _most_passes = before
