"""Attention over the chunks of a network, in blocks of fixed size, so that its cost grows with the network's length.

Blocks are aligned to the network, not to a window: all windows that hold a whole block give its chunks the same code.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features. Here W counts the
chunks of a block, and N the blocks of all networks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raywgen.nn.coders.base import Coder, silence
from raywgen.nn.transformer import Transformer

NUM_HEADS = 4


class TransformerCoder(Coder):
    """Each chunk of a block attends to the whole block.

    `12 H^2 + 7 H` parameters a layer and `H (2 K + G + 3) + K` besides (215,000 with one layer at K = 16, H = 128,
    G = 98). A chunk takes as many multiplications, and `2 H W` a layer more for attention.

    Args:
        chunk_length: K.
        num_position_features: G.
        width: H, a multiple of 8.
        num_layers: Layers of attention.
        context: W; with 1 each chunk is coded by itself.
    """

    def __init__(
        self, chunk_length: int, num_position_features: int, width: int, num_layers: int, context: int
    ) -> None:
        super().__init__()
        self.context = context
        self.value = nn.Linear(chunk_length, width)
        self.position = nn.Linear(num_position_features, width)
        self.trunk = Transformer(width, num_layers, NUM_HEADS, is_causal=False)
        self.out = nn.Linear(width, chunk_length)
        silence(self.out)

    @property
    def bytes_per_chunk(self) -> float:
        """Returns those of 21 numbers for each unit of a layer, and of 3 around the layers."""
        return 4 * (21 * len(self.trunk.blocks) + 3) * self.value.out_features

    def forward(self, x_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """Returns what is added to each chunk, as `Coder` describes."""
        B, M = x_BMK.shape[:2]
        real_BMK = x_BMK if mask_MK is None else x_BMK * mask_MK
        states_BMH = self.value(real_BMK) + self.position(positions_MG)
        is_real_BM = torch.ones(B, M, dtype=torch.bool, device=x_BMK.device)
        if mask_MK is not None:
            is_real_BM = is_real_BM & (mask_MK > 0).any(dim=-1)
        missing = -M % self.context
        states_NWH = F.pad(states_BMH, (0, 0, 0, missing)).unflatten(1, (-1, self.context)).flatten(0, 1)
        is_real_NW = F.pad(is_real_BM, (0, missing)).unflatten(1, (-1, self.context)).flatten(0, 1)
        states_NWH = self.trunk(states_NWH, is_seen_BT=is_real_NW)
        return self.out(states_NWH).unflatten(0, (B, -1)).flatten(1, 2)[:, :M]
