"""The bytes of the tensors that a piece of work makes and holds, also of tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations within this context have made and that are still held.

    Attributes:
        live: Bytes of tensors that are held now.
        peak: The most that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._held:
            return

        def released(_: object) -> None:
            self.live -= num_bytes
            del self._held[key]

        self._held[key] = weakref.ref(storage, released)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors of nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for each in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors_in(each)
