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

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

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
from raywgen.weights import Layout, Normalizer, Windows
from raywgen.weights.chunks import (
    chunk_features,
    chunk_mask,
    from_chunks,
    mean_position_features,
    num_chunks,
    num_position_features,
    position_features,
    to_chunks,
)

# Position features and hidden states take many times the memory of chunks.
_CHUNKS_OF_A_PASS = 1 << 16


class Tokenizer(nn.Module):
    """Encodes chunks to codes and decodes them; one tokeniser serves all layouts."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self._scales: Scales = config.scales if isinstance(config, TokenizerConfig) else "normalizer"
        self.encoder = self._coder()
        self.quantiser = build_quantiser(config.quantiser, config.chunk_length, config.num_steps)
        self.decoder = self._coder()
        self._padded_layouts: dict[str, bool] = {}

    @property
    def device(self) -> torch.device:
        """The device of the tokeniser, where masks and positions are too."""
        return next(self.parameters()).device

    def latents(self, chunks_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """Encodes whole networks' chunks, without quantising, `(B, M, K)`; without a mask all values are real."""
        return chunks_BMK + self.encoder(chunks_BMK, positions_MG, mask_MK)

    def encode(self, chunks_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor) -> Tensor:
        """Returns tokens int64 `(B, M, L)` of whole networks' normalised chunks, unaffected by padding (mask 0)."""
        return self._quantise(self.latents(chunks_BMK, positions_MG, mask_MK), mask_MK)

    def encode_windows(self, chunks_BXK: Tensor, layout: Layout, windows: Windows) -> Tensor:
        """Returns the tokens of `encode` that are of one window of each network, `(B, W, L)`.

        Args:
            chunks_BXK: The blocks of chunks that the encoder sees at once and that the windows touch.
            layout: Layout of the networks.
            windows: The windows.
        """
        index_BX, inner_BW = windows.index_BW, windows.inner_BW
        assert inner_BW is not None
        rows_B1 = torch.arange(len(index_BX), device=index_BX.device).unsqueeze(1)
        latents_BXK = self.latents(chunks_BXK, self.positions(layout, index_BX), self.mask(layout, index_BX))
        return self._quantise(latents_BXK[rows_B1, inner_BW - index_BX[:, :1]], self.mask(layout, inner_BW))

    def tokens(self, values_BD: Tensor, layout: Layout, normalizer: Normalizer) -> Tensor:
        """Returns the tokens int64 `(B, M, L)` of whole networks, long ones in passes over their chunks."""
        chunks_BMK = self.chunks(values_BD, layout, normalizer)
        codes = [self.encode(chunks_BMK[:, part], *inputs) for part, *inputs in self._passes(layout, len(values_BD))]
        return torch.cat(codes, dim=1)

    def decoded_values(self, codes_BML: Tensor, layout: Layout, normalizer: Normalizer) -> Tensor:
        """Returns the flat vectors `(B, D)` that tokens stand for, those of long networks in passes."""
        chunks = [self.decode(codes_BML[:, part], *inputs) for part, *inputs in self._passes(layout, len(codes_BML))]
        return self.values(torch.cat(chunks, dim=1), layout, normalizer)

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
        return scaled_chunks(layout, self._scales, self.config.chunk_length, self.device)

    @property
    def codes_scales(self) -> bool:
        """Whether scales are tokens, which follow from all of a network's values together."""
        return self._scales != "normalizer"

    def num_chunks(self, layout: Layout) -> int:
        """Returns M, the length of a network's token sequence."""
        scaled = self.scaled(layout)
        return num_chunks(layout, self.config.chunk_length) if scaled is None else len(scaled.mask_MK)

    def mask(self, layout: Layout, index_X: Tensor | None = None) -> Tensor:
        """Returns the mask of a layout's chunks, `(M, K)`, or of some chunks, `(X, K)`: 1 for values, 0 for padding."""
        scaled = self.scaled(layout)
        if scaled is None:
            return chunk_mask(layout, self.config.chunk_length, index_X, self.device)
        return scaled.mask_MK if index_X is None else scaled.mask_MK[index_X]

    def positions(self, layout: Layout, index_X: Tensor | None = None) -> Tensor:
        """Returns the position features of each chunk, `(M, G)`, or of some chunks, `(X, G)`; zeros beyond the end."""
        scaled = self.scaled(layout)
        if scaled is not None:
            return scaled.positions_MG if index_X is None else scaled.positions_MG[index_X]
        if index_X is None:
            return position_features(layout, self.config.chunk_length, self.device)
        # Chunks beyond the end fill up the last block; there a coder sees zeros.
        features_XG = chunk_features(layout, self.config.chunk_length, index_X)
        return features_XG * (index_X < self.num_chunks(layout)).unsqueeze(-1)

    def mean_position(self, layout: Layout) -> Tensor:
        """Returns the mean `(G,)` of the position features of a layout's chunks."""
        scaled = self.scaled(layout)
        if scaled is None:
            return mean_position_features(layout, self.config.chunk_length, self.device)
        return scaled.positions_MG.mean(dim=0)

    def windows_with(self, layout: Layout, index_BW: Tensor) -> Windows:
        """Returns the windows of the given chunks, with the other chunks that their tokens follow from around them."""
        index_BX = covering_blocks(index_BW, self.encoder.context, self.num_chunks(layout))
        return Windows(
            chunk_length=self.config.chunk_length,
            num_chunks=index_BX.shape[1],
            first_B=index_BX[:, 0],
            inner_BW=index_BW,
        )

    def window_chunks(self, values_BX: Tensor, windows: Windows, layout: Layout, normalizer: Normalizer) -> Tensor:
        """Returns the normalised chunks `(B, W, K)` of the values of windows, zeros beyond the end of a network.

        Only where scales are no tokens: those of a network are known from all of its values alone.
        """
        assert not self.codes_scales
        position_BX = windows.position_BX
        normalised_BX = normalizer.normalise(values_BX, position_BX.clamp(max=layout.num_values - 1))
        normalised_BX = torch.where(position_BX < layout.num_values, normalised_BX, 0.0)
        return to_chunks(normalised_BX, self.config.chunk_length)

    def padding_codes(self, layout: Layout, index_X: Tensor) -> Tensor | None:
        """Returns the codes `(X, L)` of padding tokens of some chunks, -1 for all others; None without such tokens."""
        if not self._has_padding_tokens(layout):
            return None
        mask_XK = self.mask(layout, index_X)
        is_real_XL = self.quantiser.real_tokens(mask_XK.flatten(0, -2)).unflatten(0, index_X.shape)
        return torch.where(is_real_XL, -1, self.quantiser.encode(mask_XK.new_zeros(1, mask_XK.shape[-1])))

    def table(self, layout: Layout) -> ChunkTable:
        """Returns the prior's inputs about a layout's chunks."""
        padding_codes_ML = None
        if self._has_padding_tokens(layout):
            zeros_1K = torch.zeros(1, self.config.chunk_length, device=self.device)
            padding_codes_ML = torch.where(self.real_tokens(layout), -1, self.quantiser.encode(zeros_1K))
        return ChunkTable(
            positions_MG=self.positions(layout), padding_codes_ML=padding_codes_ML, header=self._header(layout)
        )

    def real_tokens(self, layout: Layout) -> Tensor:
        """Returns which tokens of a layout's chunks hold a value, bool `(M, L)`."""
        return self.quantiser.real_tokens(self.mask(layout))

    def _has_padding_tokens(self, layout: Layout) -> bool:
        """Whether some tokens of a layout hold no value. It is asked of the device once, which would wait for it."""
        if layout.id not in self._padded_layouts:
            last_1 = torch.tensor([self.num_chunks(layout) - 1], device=self.device)
            # Without a header only the last chunk may be partly filled.
            mask_XK = self.mask(layout, last_1 if self.scaled(layout) is None else None)
            self._padded_layouts[layout.id] = not bool(self.quantiser.real_tokens(mask_XK).all())
        return self._padded_layouts[layout.id]

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

    def _passes(self, layout: Layout, num: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields chunks of `num` networks that are coded together, whole blocks of them, with positions and mask."""
        count, block = self.num_chunks(layout), self.encoder.context
        at_once = max(1, _CHUNKS_OF_A_PASS // max(1, num) // block) * block
        if count <= at_once:
            yield slice(count), self.positions(layout), self.mask(layout)
            return
        for index_X in torch.arange(count).split(at_once):
            part = slice(int(index_X[0]), int(index_X[-1]) + 1)
            yield part, self.positions(layout, index_X), self.mask(layout, index_X)

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
