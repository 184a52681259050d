"""Networks in memory, read as those of a corpus are."""

from __future__ import annotations

import torch
from torch import Tensor


class HeldWeights:
    """The flat vectors of N checkpoints."""

    def __init__(self, values_ND: Tensor) -> None:
        self._values_ND = values_ND

    def __len__(self) -> int:
        return len(self._values_ND)

    def values(self, index_B: Tensor) -> Tensor:
        return self._values_ND[index_B]

    def windows(self, index_B: Tensor, start_B: Tensor, length: int) -> Tensor:
        before = max(0, -int(start_B.min()))
        padded_ND = torch.nn.functional.pad(self._values_ND, (before, length))
        starts = zip(index_B, start_B + before, strict=True)
        parts = [padded_ND[index, start : start + length] for index, start in starts]
        return torch.stack(parts)
