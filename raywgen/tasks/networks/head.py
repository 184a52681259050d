"""A linear head on the features of a frozen encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywgen.tasks.networks.checks import check_sizes


class Head(nn.Module):
    """Logits `W x + b`, starting at zero: no class is preferred, and exchanging classes changes nothing.

    Args:
        num_features: E.
        num_classes: C.

    Raises:
        TaskError: A size is below 1.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        check_sizes(num_features=num_features, num_classes=num_classes)
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x_SE: Tensor) -> Tensor:
        """Returns logits `(S, C)`."""
        return nn.functional.linear(x_SE, self.weight, self.bias)
