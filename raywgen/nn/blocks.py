"""A network's blocks, one after another: where nearly all of its time and memory goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Blocks(nn.ModuleList):
    """Blocks that may compute their activations again in the backward pass, and may be compiled; the results are equal.

    Attributes:
        recompute: Whether only the inputs of blocks are kept for a backward pass, which computes the rest again.
        compiled: The compiled blocks that are called in place of their own; empty for none.
    """

    recompute: bool = False
    compiled: tuple[Callable[..., Tensor], ...] = ()

    def run(self, index: int, *arguments: Any) -> Tensor:
        """Calls a block.

        Args:
            index: Which one.
            arguments: Its inputs, which it must leave as they are.
        """
        block = self.compiled[index] if self.compiled else self[index]
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


def prepare_blocks(module: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """Sets how the blocks of all networks in a module are called."""
    for blocks in module.modules():
        if isinstance(blocks, Blocks):
            blocks.recompute = recompute
            blocks.compiled = tuple(torch.compile(block) for block in blocks) if compiled else ()


def compile_error(device: torch.device) -> str:
    """Compiles a trifle and returns why that failed, in one line; empty where it works."""
    try:
        torch.compile(_trifle)(torch.ones(2, device=device))
    except Exception as error:  # Backends raise errors of many kinds.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else type(error).__name__
    return ""


def _trifle(x: Tensor) -> Tensor:
    return x * 2 + 1
