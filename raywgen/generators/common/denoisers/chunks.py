"""A denoiser of networks of any size, as chunks.

Shape letters beyond the legend in `raywgen.weights`: n noised versions of a network, X values of a window, G position
features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.generators.common.denoisers.base import Denoiser, Place
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.tokenizer.windows import random_windows
from raywgen.generators.interface import DataSpec
from raywgen.nn.denoisers import ChunkDenoiser
from raywgen.weights import KeyedNoise, Layout, Windows
from raywgen.weights.chunks import (
    chunk_features,
    chunk_mask,
    from_chunks,
    num_chunks,
    num_position_features,
    position_features,
    to_chunks,
)


class ChunkWeights(Denoiser):
    """Writes any network as chunks that attend to each other, those of a long network in windows.

    A window consists of whole blocks of chunks. Windows lie inside the network but for what fills up its last block.
    """

    def __init__(self, config: NetworkConfig, data: DataSpec, block: int = 1) -> None:
        super().__init__()
        self._length, self._block = config.chunk_length, block
        self.window = config.window
        self.net = ChunkDenoiser(
            chunk_length=config.chunk_length,
            num_position_features=num_position_features(),
            num_features=data.num_features,
            max_classes=data.max_classes,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
        )

    def embed_condition(self, samples_BSF: Tensor, labels_BS: Tensor, layout: Layout) -> Tensor:
        """Embeds B support sets, `(B, H)`."""
        return self.net.embed_condition(samples_BSF, labels_BS)

    def condition_width(self) -> int:
        """Returns H, the width of the embedded condition."""
        return self.net.condition_width

    def predict(
        self,
        x_BnD: Tensor,
        time_Bn: Tensor,
        condition_embedding: Tensor,
        layout: Layout,
        place: Place | None = None,
    ) -> Tensor:
        """Predicts all chunks of networks or windows at once."""
        if place is None:
            positions = position_features(layout, self._length, x_BnD.device)
        else:
            positions, x_BnD = place.positions_BWG, x_BnD * place.is_real_BX.unsqueeze(1)
        chunks = self.net(to_chunks(x_BnD, self._length), time_Bn, condition_embedding, positions)
        return from_chunks(chunks, x_BnD.shape[-1])

    @property
    def bytes_per_value(self) -> float:
        """Returns what was measured: 21 numbers for each unit of a block, and 7 around the blocks."""
        net = self.net
        return 4 * (21 * len(net.trunk.blocks) + 7) * net.condition_width / self._length

    def draw_windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws a window of each network that is longer than one."""
        num_blocks, num_seen = self._num_blocks(layout)
        if num_seen == num_blocks:
            return None
        return self._windows(random_windows(noise, num_blocks, num_seen)[:, 0], num_seen)

    def all_windows(self, layout: Layout) -> Windows | None:
        """Returns windows side by side; the last one overlaps the one before, so that all are equally long."""
        num_blocks, num_seen = self._num_blocks(layout)
        if num_seen == num_blocks:
            return None
        return self._windows(torch.arange(0, num_blocks, num_seen).clamp(max=num_blocks - num_seen), num_seen)

    def place(self, layout: Layout, windows: Windows | None) -> Place | None:
        """Returns position features of the windows' chunks, and which of their values exist."""
        if windows is None:
            return None
        is_real_BX = self._is_real(layout, windows).to(torch.float32)
        weight_BX = is_real_BX / is_real_BX.mean(dim=1, keepdim=True)
        return Place(chunk_features(layout, self._length, windows.index_BW), weight_BX)

    def _num_blocks(self, layout: Layout) -> tuple[int, int]:
        """Returns how many blocks of chunks a network has, and how many of them are seen at once."""
        num_blocks = -(-num_chunks(layout, self._length) // self._block)
        return num_blocks, min(num_blocks, max(1, self.window // self._block)) if self.window else num_blocks

    def _windows(self, first_B: Tensor, num_blocks: int) -> Windows:
        """Returns windows of so many blocks each, given their first ones."""
        return Windows(chunk_length=self._length, num_chunks=num_blocks * self._block, first_B=first_B * self._block)

    def _is_real(self, layout: Layout, windows: Windows) -> Tensor:
        """Returns which values `(B, X)` of the windows' states are those of a network."""
        return chunk_mask(layout, self._length, windows.index_BW).flatten(1) > 0
