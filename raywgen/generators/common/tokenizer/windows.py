"""Random windows of chunks, and the blocks of chunks that hold them.

Shape letters beyond the legend in `raywgen.weights`: X chunks of the blocks around a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.weights import KeyedNoise


def random_windows(noise: KeyedNoise, num_chunks: int, window: int) -> Tensor:
    """Returns chunk indices int64 `(B, W)` of one random window per network.

    Windows that reach beyond an end are moved inside. So chunks near an end, which fewer windows contain, are not drawn
    less often than those in the middle.
    """
    start_B = noise.integers(num_chunks + window - 1) - (window - 1)
    start_B = start_B.clamp(0, num_chunks - window)
    return start_B.unsqueeze(1) + torch.arange(window, device=start_B.device)


def covering_blocks(index_BW: Tensor, block: int, num_chunks: int) -> Tensor:
    """Returns chunk indices int64 `(B, X)` of the blocks that each window overlaps, equally many for all windows.

    Args:
        index_BW: Indices of consecutive chunks of each network.
        block: Chunks of a block; blocks lie side by side from chunk 0 on.
        num_chunks: Chunks of the network; higher indices are padding of its last block.
    """
    num_blocks = -(-num_chunks // block)
    num_touched = min(num_blocks, (index_BW.shape[1] + block - 2) // block + 1)
    first_B = (index_BW[:, 0] // block).clamp(max=num_blocks - num_touched)
    return first_B.unsqueeze(1) * block + torch.arange(num_touched * block, device=index_BW.device)
