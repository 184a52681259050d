"""What the tests of every network measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.tasks.networks import build_network


def num_parameters(recipe: Mapping[str, Any]) -> int:
    """Trainable values of a network that is built without memory."""
    with torch.device("meta"):
        module = build_network(recipe)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    return sum(parameter.numel() for parameter in module.parameters())


def without_gradient(module: nn.Module, x: Tensor) -> list[str]:
    """Parameters that the outputs do not depend on, or on which their gradient is not finite."""
    module(x).logsumexp(dim=1).sum().backward()
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.any() or not parameter.grad.isfinite().all()
    ]
