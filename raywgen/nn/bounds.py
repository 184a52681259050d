"""Bounds what a network that came as data may fill before its memory is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

MOST_VALUES = 1 << 30
"""Of a network whose data do not show that there are more; vision transformers of size L have a third of it."""
_SLACK = 4
"""How many times the values that are stored a network may hold while it is built: adapters have a base beside them."""
_MOST_CALLS = 100_000


class TooLargeError(ValueError):
    """A network that came as data and would take more memory than any that belongs to it."""


class Bounded(TorchDispatchMode):
    """Refuses modules whose tensors together would hold too many values; nothing is allocated for them.

    Args:
        num_stored: Values that are stored for them, as far as it is known.
    """

    def __init__(self, num_stored: int = 0) -> None:
        super().__init__()
        self._most_values = max(MOST_VALUES, _SLACK * num_stored)
        self._num_values = self._num_calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Looks at the size that a call asks for, and then lets it through.

        Raises:
            TooLargeError: It asks for too much.
        """
        self._num_calls += 1
        size = args[0] if args else ()
        # Only what makes a tensor out of nothing takes its size first.
        if isinstance(size, list | tuple) and all(isinstance(each, int) for each in size):
            self._num_values += math.prod(size)
        if self._num_values > self._most_values:
            raise TooLargeError(f"it would hold more than {self._most_values:,} values, and fewer are stored for it")
        if self._num_calls > _MOST_CALLS:
            raise TooLargeError(f"it is built in more than {_MOST_CALLS:,} steps")
        return func(*args, **(kwargs or {}))
