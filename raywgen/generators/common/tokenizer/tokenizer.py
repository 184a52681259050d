"""The VQ-VAE that turns chunks into tokens (IGPG, section 3, stage 1).

The paper's tokeniser is a Gumbel-softmax VQ-VAE over images folded from chunks. Here encoder and decoder are residual
around the identity, read each chunk's position features, and are by default perceptrons. The quantiser is by default
residual with moving-average codebooks. So the tokeniser starts as plain residual k-means and can only improve on it.
Few values per token matter more than a large decoder, which memorises.

With `scales=tensor` or `filter` the first chunks of a network hold its own scales and means (`scales.py`). Decoding
then needs only the tokens and the layout, and the base if networks share one.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features, X chunks of the blocks
around a window.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raywgen.generators.common.tokenizer.chunk_table import ChunkTable, HeaderChunks
from raywgen.generators.common.tokenizer.config import Scales, TokenizerConfig, VQVAEConfig
from raywgen.generators.common.tokenizer.scales import (
    ScaledChunks,
    num_scaled_position_features,
    scaled_chunks,
    unit_normalizer,
)
from raywgen.generators.common.tokenizer.windows import covering_blocks
from raywgen.nn.coders import Coder, build_coder
from raywgen.nn.quantisers import build_quantiser
from raywgen.weights import Layout, Normalizer
from raywgen.weights.chunks import chunk_mask, from_chunks, num_position_features, position_features, to_chunks


class Tokenizer(nn.Module):
    """Encodes chunks to codes and decodes them; one tokeniser serves all layouts."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self._scales: Scales = config.scales if isinstance(config, TokenizerConfig) else "normalizer"
        self.encoder = self._coder()
        self.quantiser = build_quantiser(config.quantiser, config.chunk_length, config.num_steps)
        self.decoder = self._coder()

    def latents(self, chunks_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """Encodes whole networks' chunks, without quantising, `(B, M, K)`; without a mask all values are real."""
        return chunks_BMK + self.encoder(chunks_BMK, positions_MG, mask_MK)

    def encode(self, chunks_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor) -> Tensor:
        """Returns tokens int64 `(B, M, L)` of whole networks' normalised chunks, unaffected by padding (mask 0)."""
        return self._quantise(self.latents(chunks_BMK, positions_MG, mask_MK), mask_MK)

    def encode_windows(self, chunks_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor, index_BW: Tensor) -> Tensor:
        """Returns the part of `encode`'s tokens that belongs to one window of each network, `(B, W, L)`.

        Only the encoder's blocks of chunks that overlap the windows are encoded.

        Args:
            chunks_BMK: Chunks of whole networks.
            positions_MG: Position features of all chunks.
            mask_MK: 1 for values, 0 for padding, of all chunks.
            index_BW: Indices of consecutive chunks of each network, int64.
        """
        block = self.encoder.context
        index_BX = covering_blocks(index_BW, block, len(positions_MG))
        whole = (F.pad(part, (0, 0, 0, -len(positions_MG) % block)) for part in (chunks_BMK, positions_MG, mask_MK))
        whole_BMK, whole_MG, whole_mask_MK = whole
        rows_B1 = torch.arange(len(index_BW), device=index_BW.device).unsqueeze(1)
        latents_BXK = self.latents(whole_BMK[rows_B1, index_BX], whole_MG[index_BX], whole_mask_MK[index_BX])
        return self._quantise(latents_BXK[rows_B1, index_BW - index_BX[:, :1]], mask_MK[index_BW])

    def decode_latents(self, latents_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """Decodes latents (code vectors or expectations over them) to whole networks' normalised chunks `(B, M, K)`."""
        return latents_BMK + self.decoder(latents_BMK, positions_MG, mask_MK)

    def decode(self, codes_BML: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """Decodes tokens to whole networks' normalised chunks `(B, M, K)`."""
        return self.decode_latents(self.quantiser.decode(codes_BML), positions_MG, mask_MK)

    def chunks(self, values_BD: Tensor, layout: Layout, normalizer: Normalizer, *, by_code: bool = True) -> Tensor:
        """Cuts flat vectors into normalised chunks `(B, M, K)`.

        Args:
            values_BD: Networks.
            layout: Their layout.
            normalizer: Base and scale; only the base is used where scales are coded.
            by_code: Whether values are normalised by the decoded scales, or by the scales themselves. Training uses
                the scales themselves: early codes of scales may be bad, and would give values of any size, which the
                codebooks would follow.
        """
        scaled = self.scaled(layout)
        if scaled is None:
            return to_chunks(normalizer.normalise(values_BD), self.config.chunk_length)

        @torch.no_grad()
        def kept(chunks_BMK: Tensor, part: slice) -> Tensor:
            if not by_code or not chunks_BMK.shape[1]:
                return chunks_BMK
            positions_MG, mask_MK = self.positions(layout)[part], self.mask(layout)[part]
            return self.decode(self.encode(chunks_BMK, positions_MG, mask_MK), positions_MG, mask_MK)

        return scaled.encode(unit_normalizer(layout, normalizer).normalise(values_BD), kept)

    def values(self, chunks_BMK: Tensor, layout: Layout, normalizer: Normalizer) -> Tensor:
        """Turns normalised chunks back to flat vectors `(B, D)`."""
        scaled = self.scaled(layout)
        if scaled is None:
            return normalizer.denormalise(from_chunks(chunks_BMK, layout.num_values))
        return unit_normalizer(layout, normalizer).denormalise(scaled.decode(chunks_BMK))

    def scaled(self, layout: Layout) -> ScaledChunks | None:
        """Returns a layout's chunks with a header of scales; None where scales are not coded."""
        if self._scales == "normalizer":
            return None
        return scaled_chunks(layout, self._scales, self.config.chunk_length)

    def mask(self, layout: Layout) -> Tensor:
        """Returns the mask of a layout's chunks, `(M, K)`: 1 for values, 0 for padding."""
        scaled = self.scaled(layout)
        return chunk_mask(layout, self.config.chunk_length) if scaled is None else scaled.mask_MK

    def positions(self, layout: Layout) -> Tensor:
        """Returns the position features of each chunk, `(M, G)`."""
        scaled = self.scaled(layout)
        return position_features(layout, self.config.chunk_length) if scaled is None else scaled.positions_MG

    def table(self, layout: Layout) -> ChunkTable:
        """Returns the prior's inputs about a layout's chunks."""
        is_real_ML, padding_codes_ML = self.real_tokens(layout), None
        if not bool(is_real_ML.all()):
            zeros_1K = torch.zeros(1, self.config.chunk_length, device=is_real_ML.device)
            padding_codes_ML = torch.where(is_real_ML, -1, self.quantiser.encode(zeros_1K))
        return ChunkTable(
            positions_MG=self.positions(layout), padding_codes_ML=padding_codes_ML, header=self._header(layout)
        )

    def real_tokens(self, layout: Layout) -> Tensor:
        """Returns which tokens of a layout's chunks hold a value, bool `(M, L)`."""
        return self.quantiser.real_tokens(self.mask(layout))

    @property
    def num_position_features(self) -> int:
        """Returns G, the number of position features."""
        return num_scaled_position_features() if self._scales != "normalizer" else num_position_features()

    def num_header_chunks(self, layout: Layout) -> int:
        """Returns the number of header chunks, which hold scales and means."""
        scaled = self.scaled(layout)
        return 0 if scaled is None else scaled.num_header_chunks

    def _header(self, layout: Layout) -> HeaderChunks | None:
        scaled = self.scaled(layout)
        if scaled is None:
            return None
        part = slice(0, scaled.num_header_chunks)
        decode = partial(self.decode, positions_MG=scaled.positions_MG[part], mask_MK=scaled.mask_MK[part])
        return HeaderChunks(num=scaled.num_header_chunks, decode=decode, scale_index_M4=scaled.scale_index_M4)

    def _quantise(self, latents_BMK: Tensor, mask_MK: Tensor) -> Tensor:
        mask_BMK = mask_MK.expand_as(latents_BMK)
        codes_NL = self.quantiser.encode(latents_BMK.flatten(0, 1), mask_BMK.flatten(0, 1))
        return codes_NL.unflatten(0, latents_BMK.shape[:2])

    def _coder(self) -> Coder:
        sizes = self.config
        return build_coder(
            sizes.coder,
            sizes.chunk_length,
            self.num_position_features,
            sizes.width,
            num_layers=sizes.coder_layers,
            context=sizes.context,
        )
