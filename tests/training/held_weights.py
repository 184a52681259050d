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
        padded_ND = torch.nn.functional.pad(self._values_ND, (0, length))
        parts = [padded_ND[index, start : start + length] for index, start in zip(index_B, start_B, strict=True)]
        return torch.stack(parts)
