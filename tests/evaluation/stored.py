"""Reads at once what an evaluation reads in blocks, and counts the networks that an evaluation holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raywgen.evaluation.stored_networks import StoredNetworks
from raywgen.weights import Layout


def every_value(stored: StoredNetworks) -> Tensor:
    """Returns the flat vectors of all stored networks."""
    return stored.values(torch.arange(len(stored)))


class NetworksHeld(TorchDispatchMode):
    """Counts the networks in each tensor that is allocated: flat vectors, packed forms or all chunks of networks.

    Attributes:
        most: Largest number of networks in one tensor.
        operator: The operator that allocated it.
    """

    def __init__(self, layouts: Sequence[Layout], chunk_length: int = 0) -> None:
        super().__init__()
        self._num_values = {layout.num_values for layout in layouts}
        self._num_bytes = {layout.num_bytes for layout in layouts}
        length = chunk_length
        self._chunked = {(-(-layout.num_values // length), length) for layout in layouts} if length else set()
        self.most, self.operator = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A view, for instance of a mapped shard, allocates nothing.
        if all(each.alias_info is None for each in func._schema.returns):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and (count := self._networks(tensor)) > self.most:
                    self.most, self.operator = count, str(func)
        return out

    def _networks(self, tensor: Tensor) -> int:
        shape = tuple(tensor.shape)
        if shape[-1:] and (shape[-1] in self._num_values or (tensor.itemsize == 1 and shape[-1] in self._num_bytes)):
            return tensor.numel() // shape[-1]
        if shape[-2:] in self._chunked:
            return tensor.numel() // (shape[-2] * shape[-1])
        return 0
