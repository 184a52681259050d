"""Counts and lists in words."""

from __future__ import annotations

from collections.abc import Sequence


def counted(num: float, noun: str) -> str:
    """Returns a number, rounded to a whole one, with its noun, which takes an s unless it is 1."""
    return f"{num:,.0f} {noun}{'s' * (round(num) != 1)}"


def listed(names: Sequence[str]) -> str:
    """Returns names with commas and an `and` between them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
