"""The VQ-VAE that turns chunks into tokens (IGPG, section 3, stage 1).

The paper's tokeniser is a Gumbel-softmax VQ-VAE over images folded from chunks. Here encoder and decoder are residual
around the identity, read each chunk's position features, and are by default perceptrons. The quantiser is by default
residual with moving-average codebooks. So the tokeniser starts as plain residual k-means and can only improve on it.
Few values per token matter more than a large decoder, which memorises.

With `scales=tensor` or `filter` the first chunks of a network hold its own scales and means (`scales.py`). Decoding
then needs only the tokens and the layout, and the base if networks share one. A window of a network is encoded given
its values and the moments of the header chunks that hold its scales.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features, X chunks of the blocks
around a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from raywgen.generators.common.tokenizer.chunk_table import ChunkInputs, ChunkTable, ComputedChunkTable, HeaderChunks
from raywgen.generators.common.tokenizer.config import Scales, TokenizerConfig, VQVAEConfig
from raywgen.generators.common.tokenizer.scales import (
    HeaderChunkNumbers,
    ScaledChunks,
    num_scaled_position_features,
    numbers_at,
    scaled_chunks,
)
from raywgen.generators.common.tokenizer.windows import covering_blocks
from raywgen.nn.coders import Coder, build_coder
from raywgen.nn.quantisers import build_quantiser
from raywgen.weights import HeaderIndex, Layout, Normalizer, WeightBatch, Windows
from raywgen.weights.chunks import (
    BLOCK,
    chunk_features,
    chunk_mask,
    from_chunks,
    mean_position_features,
    num_chunks,
    num_position_features,
    position_features,
    to_chunks,
)
from raywgen.weights.groups import ReadValues, network_moments, unit_normalizer

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

        kept = partial(self._kept, layout, by_code)
        return scaled.encode(unit_normalizer(layout, normalizer).normalise(values_BD), kept)

    @torch.no_grad()
    def _kept(self, layout: Layout, by_code: bool, header_BYK: Tensor, index_Y: Tensor) -> Tensor:
        """Returns header chunks after encoding and decoding, or as they are."""
        if not by_code:
            return header_BYK
        positions_YG, mask_YK = self.positions(layout, index_Y), self.mask(layout, index_Y)
        return self.decode(self.encode(header_BYK, positions_YG, mask_YK), positions_YG, mask_YK)

    def values(self, chunks_BMK: Tensor, layout: Layout, normalizer: Normalizer) -> Tensor:
        """Turns normalised chunks back to flat vectors `(B, D)`."""
        scaled = self.scaled(layout)
        if scaled is None:
            return normalizer.denormalise(from_chunks(chunks_BMK, layout.num_values))
        return unit_normalizer(layout, normalizer).denormalise(scaled.decode(chunks_BMK))

    def values_of_chunks(
        self, chunks_BXK: Tensor, first: int, layout: Layout, normalizer: Normalizer, header_BYK: Tensor | None
    ) -> Tensor:
        """Turns some normalised chunks of values back to values, `(B, num_values)`, as `values` does.

        Args:
            chunks_BXK: Consecutive chunks, none of them of the header; what lies beyond the network's end is dropped.
            first: Number of the first of them in the network.
            layout: Layout of the networks.
            normalizer: Base and scale; only the base is used where scales are coded.
            header_BYK: All header chunks, where scales are coded.
        """
        K, scaled = self.config.chunk_length, self.scaled(layout)
        start = (first - (0 if scaled is None else scaled.num_header_chunks)) * K
        stop = min(start + chunks_BXK.shape[1] * K, layout.num_values)
        values_BX = from_chunks(chunks_BXK, stop - start)
        position_X = torch.arange(start, stop, device=values_BX.device)
        if scaled is None:
            return normalizer.denormalise(values_BX, position_X)
        assert header_BYK is not None
        values_BX = scaled.decode_values(values_BX, position_X, header_BYK)
        return unit_normalizer(layout, normalizer).denormalise(values_BX, position_X)

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
        return num_chunks(layout, self.config.chunk_length) if scaled is None else scaled.num_chunks

    def mask(self, layout: Layout, index_X: Tensor | None = None) -> Tensor:
        """Returns the mask of a layout's chunks, `(M, K)`, or of some chunks, `(X, K)`: 1 for values, 0 for padding."""
        scaled = self.scaled(layout)
        if scaled is None:
            return chunk_mask(layout, self.config.chunk_length, index_X, self.device)
        return scaled.mask_MK if index_X is None else scaled.mask(index_X)

    def positions(self, layout: Layout, index_X: Tensor | None = None) -> Tensor:
        """Returns the position features of each chunk, `(M, G)`, or of some chunks, `(X, G)`; zeros beyond the end."""
        scaled = self.scaled(layout)
        if scaled is not None:
            return scaled.positions_MG if index_X is None else scaled.positions(index_X)
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
        return scaled.mean_position_G

    def windows_with(self, layout: Layout, index_BW: Tensor) -> Windows:
        """Returns the windows of the given chunks, with the other chunks that their tokens follow from around them."""
        index_BX = covering_blocks(index_BW, self.encoder.context, self.num_chunks(layout))
        windows = Windows(
            chunk_length=self.config.chunk_length,
            num_chunks=index_BX.shape[1],
            first_B=index_BX[:, 0],
            inner_BW=index_BW,
        )
        return self.with_header(layout, windows)

    def with_header(self, layout: Layout, windows: Windows) -> Windows:
        """Returns windows with the header chunks that they follow from, if scales are tokens."""
        scaled = self.scaled(layout)
        return windows if scaled is None else scaled.with_header(windows)

    def cut(self, batch: WeightBatch, windows: Windows, normalizer: Normalizer) -> WeightBatch:
        """Returns windows of a batch of whole networks, with the moments that they need where scales are tokens."""
        scaled = self.scaled(batch.layout)
        if scaled is None or windows.header is None or batch.codes_BWL is not None:
            return batch.cut(windows)
        moments_BN = self.read_moments(batch.layout, normalizer, lambda start, stop: batch.values_BD[:, start:stop])
        return batch.cut(windows, scaled.header_moments(moments_BN, windows.header.index_BY))

    def read_moments(self, layout: Layout, normalizer: Normalizer, read: ReadValues) -> Tensor:
        """Returns the moments `(B, N)` that the scales of networks follow from, where these are tokens."""
        return network_moments(layout, self._scales, normalizer, read)

    def header_of_moments(self, moments_BN: Tensor, layout: Layout, windows: Windows) -> HeaderChunkNumbers | None:
        """Returns the numbers of the header chunks of windows, as `window_header` does, given all moments."""
        scaled, header = self.scaled(layout), windows.header
        if scaled is None or header is None:
            return None
        moments_BYK = scaled.header_moments(moments_BN, header.index_BY)
        return scaled.header(moments_BYK, header.index_BY, partial(self._kept, layout, True))

    def window_header(self, batch: WeightBatch, *, by_code: bool = True) -> HeaderChunkNumbers | None:
        """Returns the numbers of the header chunks of a batch of windows; None where scales are no tokens.

        Args:
            batch: Windows of networks, or their tokens.
            by_code: As in `chunks`.
        """
        layout, header = batch.layout, None if batch.windows is None else batch.windows.header
        scaled = self.scaled(layout)
        if scaled is None or header is None:
            return None
        index_BY = header.index_BY
        if batch.codes_BWL is None:
            assert batch.moments_BYK is not None, "windows come with the moments of their header"
            return scaled.header(batch.moments_BYK, index_BY, partial(self._kept, layout, by_code))
        codes_BYL = batch.codes_BWL[:, batch.codes_BWL.shape[1] - index_BY.shape[1] :]
        numbers_BYK = self.decode(codes_BYL, self.positions(layout, index_BY), self.mask(layout, index_BY))
        return HeaderChunkNumbers(numbers_BYK, numbers_BYK)

    def chunk_scales(self, layout: Layout, index_BW: Tensor, header: HeaderChunkNumbers, place: HeaderIndex) -> Tensor:
        """Returns the scales and means of the chunks of windows, `(B, W, 4)`, as `ChunkScales` gives them.

        Args:
            layout: Layout of the networks.
            index_BW: The chunks.
            header: The numbers of the windows' header chunks.
            place: Which header chunks these are.
        """
        scaled = self.scaled(layout)
        assert scaled is not None
        return numbers_at(header.kept_BYK, place.index_BY, scaled.scale_index(index_BW))

    def window_chunks(
        self,
        values_BX: Tensor,
        windows: Windows,
        layout: Layout,
        normalizer: Normalizer,
        header: HeaderChunkNumbers | None = None,
    ) -> Tensor:
        """Returns the normalised chunks `(B, W, K)` of windows, zeros beyond the end of a network.

        Args:
            values_BX: The values of the windows.
            windows: The windows.
            layout: Layout of the networks.
            normalizer: Base and scale; only the base is used where scales are coded.
            header: The numbers of the windows' header chunks, by `window_header`, where scales are coded.
        """
        position_BX, scaled = windows.position_BX, self.scaled(layout)
        inside_BX = position_BX.clamp(0, layout.num_values - 1)
        if scaled is not None:
            assert header is not None
            return scaled.window(unit_normalizer(layout, normalizer).normalise(values_BX, inside_BX), windows, header)
        normalised_BX = normalizer.normalise(values_BX, inside_BX)
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

    def chunk_inputs(self, layout: Layout) -> ChunkInputs:
        """Returns the prior's inputs about a layout's chunks: a table, or for a large layout what computes its rows."""
        if self.num_chunks(layout) <= BLOCK:
            return self.table(layout)
        return ComputedChunkTable(
            num_chunks=self.num_chunks(layout),
            mean_position_G=self.mean_position(layout),
            positions_of=partial(self.positions, layout),
            padding_codes_of=partial(self.padding_codes, layout),
            header=self._header(layout),
        )

    def real_tokens(self, layout: Layout) -> Tensor:
        """Returns which tokens of a layout's chunks hold a value, bool `(M, L)`."""
        return self.quantiser.real_tokens(self.mask(layout))

    def _has_padding_tokens(self, layout: Layout) -> bool:
        """Whether some tokens of a layout hold no value. It is asked of the device once, which would wait for it."""
        if layout.id not in self._padded_layouts:
            # Only the last chunks of means, of scales and of values may be partly filled.
            scaled = self.scaled(layout)
            last = [self.num_chunks(layout) - 1, *([] if scaled is None else scaled.last_header_chunks)]
            mask_XK = self.mask(layout, torch.tensor(last, device=self.device))
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
        index_Y = torch.arange(scaled.num_header_chunks, device=self.device)
        decode = partial(self.decode, positions_MG=scaled.positions(index_Y), mask_MK=scaled.mask(index_Y))
        return HeaderChunks(num=scaled.num_header_chunks, decode=decode, scale_index=scaled.scale_index)

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
