"""A denoiser of networks of any size, as latents of a trained tokeniser.

Shape letters beyond the legend in `raywgen.weights`: Z values of a denoised state.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from raywgen.generators.common.denoisers.chunks import ChunkWeights
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.tokenizer import Tokenizer
from raywgen.generators.interface import DataSpec
from raywgen.weights import Condition, Layout, Windows
from raywgen.weights.chunks import from_chunks, num_chunks, to_chunks


class LatentWeights(ChunkWeights):
    """Writes any network as latents of a trained tokeniser, one for each chunk."""

    def __init__(self, config: NetworkConfig, tokenizer: Tokenizer, data: DataSpec) -> None:
        super().__init__(
            replace(config, chunk_length=tokenizer.config.chunk_length), data, block=tokenizer.encoder.context
        )
        self._frozen = (tokenizer,)

    @torch.no_grad()
    def encode(
        self, normalised_BAD: Tensor, condition: Condition, layout: Layout, windows: Windows | None = None
    ) -> Tensor:
        """Encodes weights by the tokeniser, without quantising."""
        return self.latents(normalised_BAD, layout, windows)

    def decode(self, states_BZ: Tensor, condition: Condition, layout: Layout, windows: Windows | None = None) -> Tensor:
        """Decodes latents by the tokeniser."""
        return self.weights(states_BZ, layout, windows)

    def latents(self, normalised_BAD: Tensor, layout: Layout, windows: Windows | None = None) -> Tensor:
        """Encodes weights to latents; unlike `encode` it takes no condition."""
        (tokenizer,) = self._frozen
        chunks = to_chunks(normalised_BAD, self._length)
        num_states = 1 if windows is None else chunks.shape[1]
        positions, mask = (part.repeat_interleave(num_states, dim=0) for part in self._about(layout, windows, chunks))
        return (
            tokenizer.latents(chunks.flatten(0, 1), positions, mask).flatten(1).unflatten(0, normalised_BAD.shape[:2])
        )

    def weights(self, states_BZ: Tensor, layout: Layout, windows: Windows | None = None) -> Tensor:
        """Decodes latents to weights; unlike `decode` it takes no condition."""
        (tokenizer,) = self._frozen
        chunks = tokenizer.decode_latents(to_chunks(states_BZ, self._length), *self._about(layout, windows, states_BZ))
        return from_chunks(chunks, layout.num_values if windows is None else windows.num_values)

    def _about(self, layout: Layout, windows: Windows | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns position features and mask of all chunks, or of those of windows, as the tokeniser has them."""
        (tokenizer,) = self._frozen
        index_BW = None if windows is None else windows.index_BW
        positions, mask = tokenizer.positions(layout, index_BW), tokenizer.mask(layout, index_BW)
        return positions.to(like.device), mask.to(like.device)

    def _is_real(self, layout: Layout, windows: Windows) -> Tensor:
        """Returns which latents are those of a network; one that fills up the last chunk is."""
        is_real_BW = windows.index_BW < num_chunks(layout, self._length)
        return is_real_BW.repeat_interleave(self._length, dim=1)

    def num_states(self, layout: Layout) -> int:
        """Returns the number of values of all chunks, including the padding of the last one."""
        return num_chunks(layout, self._length) * self._length
