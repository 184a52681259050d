"""Counts the networks that a computation holds in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from raywgen.weights import Layout


class NetworksHeld(TorchFunctionMode):
    """Counts the networks in each tensor that is allocated: flat vectors, packed forms or all chunks of networks.

    Attributes:
        most: Largest number of networks in one tensor.
        function: The function that returned it.
    """

    def __init__(self, layouts: Sequence[Layout], chunk_length: int = 0) -> None:
        super().__init__()
        self._num_values = {layout.num_values for layout in layouts}
        self._num_bytes = {layout.num_bytes for layout in layouts}
        length = chunk_length
        self._chunked = {(-(-layout.num_values // length), length) for layout in layouts} if length else set()
        self.most, self.function = 0, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # A view, for instance of a mapped shard, allocates nothing.
            if isinstance(tensor, Tensor) and not tensor._is_view() and (count := self._networks(tensor)) > self.most:
                self.most, self.function = count, str(func)
        return out

    def _networks(self, tensor: Tensor) -> int:
        shape = tuple(tensor.shape)
        if shape[-1:] and (shape[-1] in self._num_values or (tensor.itemsize == 1 and shape[-1] in self._num_bytes)):
            return tensor.numel() // shape[-1]
        if shape[-2:] in self._chunked:
            return tensor.numel() // (shape[-2] * shape[-1])
        return 0
