"""Modules inside the wrappers that people put around them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(module: nn.Module) -> nn.Module:
    """The network itself, inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner
