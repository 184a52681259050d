"""Bounds the size of networks that are built from data, before any memory is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

MOST_VALUES = 1 << 30
"""The bound for a network with few stored values; vision transformers of size L have a third of it."""
_SLACK = 4
"""Ratio of values that may be built to values that are stored: adapters also need their base network."""
_MOST_CALLS = 100_000


class TooLargeError(ValueError):
    """A network from data would take far more memory than its stored values justify."""


class Bounded(TorchDispatchMode):
    """Refuses to build modules whose tensors hold too many values in all, before they are allocated.

    Args:
        num_stored: Number of values that are stored for the modules, as far as it is known.
    """

    def __init__(self, num_stored: int = 0) -> None:
        super().__init__()
        self._most_values = max(MOST_VALUES, _SLACK * num_stored)
        self._num_values = self._num_calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Adds up the sizes that torch calls ask for, and then runs each call.

        Raises:
            TooLargeError: The calls ask for too much.
        """
        self._num_calls += 1
        size = args[0] if args else ()
        # Only functions that create a tensor take its size as their first argument.
        if isinstance(size, list | tuple) and all(isinstance(each, int) for each in size):
            self._num_values += math.prod(size)
        if self._num_values > self._most_values:
            raise TooLargeError(f"it would hold more than {self._most_values:,} values, and fewer are stored for it")
        if self._num_calls > _MOST_CALLS:
            raise TooLargeError(f"it is built in more than {_MOST_CALLS:,} steps")
        return func(*args, **(kwargs or {}))
