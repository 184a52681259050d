"""Checks of arguments that several networks share."""

from __future__ import annotations

from raywgen.tasks.base import TaskError


def check_sizes(**sizes: int) -> None:
    """Refuses sizes below 1 by their name.

    Raises:
        TaskError: A size is below 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise TaskError(f"{name}={size}: give a whole number of at least 1")
