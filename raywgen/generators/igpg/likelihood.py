"""The likelihood of a corpus' tokens under the prior, and the part of each network that a step sees.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raywgen.generators.common.dropped import with_dropped_parts
from raywgen.generators.common.tokenizer import Tokenizer
from raywgen.generators.common.tokenizer.chunk_table import ChunkTable
from raywgen.generators.common.tokenizer.windows import random_windows
from raywgen.generators.igpg.head import Codebooks
from raywgen.generators.igpg.prior import Prior
from raywgen.weights import KeyedNoise, Layout, Normalizer, NormalizerTable, WeightBatch, Windows


def token_nll(
    prior: Prior, tokenizer: Tokenizer, batch: WeightBatch, normalizers: NormalizerTable, noise: KeyedNoise
) -> Tensor:
    """Returns `-E[log p(s | e_A, e_D)]`, nats per token, mean over a batch's networks (IGPG, section 3, stage 2).

    Padding tokens do not count. Of networks longer than the prior's window a random window is read. In training mode,
    some networks lose a part of their condition, and some have each chunk read independently; with
    `independent_share=1` chunks are independent in evaluation mode too.
    """
    config, rvq = prior.config, tokenizer.quantiser
    seen = _seen_tokens(prior, tokenizer, batch, normalizers, noise)
    condition = with_dropped_parts(batch.condition, noise, config.condition_dropout, prior.training)
    prefix_BTH = prior.prefix(condition, tokenizer.mean_position(batch.layout))
    if config.independent_share == 0 or (not prior.training and config.independent_share < 1):
        return -_log_likelihood(prior, prefix_BTH, seen, rvq).mean()
    is_alone_B = noise.uniform(1)[:, 0] < config.independent_share
    return -_mixed_log_likelihood(prior, prefix_BTH, seen, rvq, is_alone_B) / seen.codes_BWL.numel()


class _TokenWindow(NamedTuple):
    """The part of each network that a step sees: all tokens, or those of a window.

    Attributes:
        codes_BWL: Tokens.
        positions_WG: Position features of their chunks, the same for all networks or `(B, W, G)`.
        padding_codes_WL: As in `ChunkTable`, the same for all networks or `(B, W, L)`.
        scales_BW4: Scales and means that windows are given; None where none are given.
        alone_BW4: Scales and means that independent chunks are given.
    """

    codes_BWL: Tensor
    positions_WG: Tensor
    padding_codes_WL: Tensor | None
    scales_BW4: Tensor | None
    alone_BW4: Tensor | None

    def of(self, rows_B: Tensor) -> _TokenWindow:
        """Selects some of the networks."""
        parts = (None if part is None else part.expand(len(self.codes_BWL), -1, -1)[rows_B] for part in self)
        return _TokenWindow(*parts)  # pyright: ignore[reportArgumentType]

    @property
    def weight(self) -> Tensor | float:
        """The weight of each token: 0 for padding, equal for all others, 1 on average."""
        if self.padding_codes_WL is None:
            return 1.0
        is_real_WL = (self.padding_codes_WL < 0).to(torch.float32)
        return is_real_WL / is_real_WL.mean(dim=(-2, -1), keepdim=True)


def _mixed_log_likelihood(
    prior: Prior, prefix_BTH: Tensor, seen: _TokenWindow, rvq: Codebooks, is_alone_B: Tensor
) -> Tensor:
    """Returns the weighted sum over all tokens; where `is_alone_B`, each chunk is a window of its own."""
    total = prefix_BTH.new_zeros(())
    if not bool(is_alone_B.all()):
        total = total + _log_likelihood(prior, prefix_BTH[~is_alone_B], seen.of(~is_alone_B), rvq).sum()
    if bool(is_alone_B.any()):
        alone = seen.of(is_alone_B)
        hidden_BWH = prior.states_alone(prefix_BTH[is_alone_B], alone.positions_WG, alone.alone_BW4)
        log_p_BWL = prior.head.log_likelihood(hidden_BWH, alone.codes_BWL, rvq, alone.padding_codes_WL)
        total = total + (log_p_BWL * alone.weight).sum()
    return total


def _log_likelihood(prior: Prior, prefix_BTH: Tensor, seen: _TokenWindow, rvq: Codebooks) -> Tensor:
    """Returns the weighted log-probability of each token, `(B, W, L)`."""
    hidden_BWH = prior.states(prefix_BTH, seen.positions_WG, rvq.decode(seen.codes_BWL), seen.scales_BW4)
    return prior.head.log_likelihood(hidden_BWH, seen.codes_BWL, rvq, seen.padding_codes_WL) * seen.weight


def prior_windows(prior: Prior, tokenizer: Tokenizer, layout: Layout, noise: KeyedNoise) -> Windows | None:
    """Draws a random window of the prior for each network, and the blocks of chunks that its tokens follow from.

    None where all of a network is one window.
    """
    count, window = tokenizer.num_chunks(layout), prior.config.window
    if window == 0 or count <= window:
        return None
    return tokenizer.windows_with(layout, random_windows(noise, count, window))


@torch.no_grad()
def _seen_tokens(
    prior: Prior, tokenizer: Tokenizer, batch: WeightBatch, normalizers: NormalizerTable, noise: KeyedNoise
) -> _TokenWindow:
    """Encodes the part of each network that the step sees, and little more, or takes its stored tokens."""
    layout, normalizer = batch.layout, normalizers[batch.layout.id][1]
    if batch.windows is None and (windows := prior_windows(prior, tokenizer, layout, noise)) is not None:
        batch = tokenizer.cut(batch, windows, normalizer)
    if (windows := batch.windows) is None or windows.inner_BW is None:
        return _seen_of_whole(prior, tokenizer, batch, tokenizer.table(layout), normalizer)
    index_BW, codes_BWL = windows.inner_BW, batch.codes_BWL
    header = tokenizer.window_header(batch)
    if codes_BWL is None:
        chunks_BXK = tokenizer.window_chunks(batch.values_BD, windows, layout, normalizer, header)
        codes_BWL = tokenizer.encode_windows(chunks_BXK, layout, windows)
    codes_BWL = codes_BWL[:, : index_BW.shape[1]]  # Stored tokens of the header come after those of the window.
    positions_BWG, padding_codes_BWL = tokenizer.positions(layout, index_BW), tokenizer.padding_codes(layout, index_BW)
    if header is None or windows.header is None or prior.scales is None:
        return _TokenWindow(codes_BWL, positions_BWG, padding_codes_BWL, None, None)
    alone_BW4 = tokenizer.chunk_scales(layout, index_BW, header, windows.header)
    # A window that begins within the header gets no scales beside the tokens, here as in sampling.
    is_after_B11 = (index_BW[:, :1, None] >= windows.header.num_chunks).to(alone_BW4.dtype)
    return _TokenWindow(codes_BWL, positions_BWG, padding_codes_BWL, alone_BW4 * is_after_B11, alone_BW4)


def _seen_of_whole(
    prior: Prior, tokenizer: Tokenizer, batch: WeightBatch, table: ChunkTable, normalizer: Normalizer
) -> _TokenWindow:
    """Takes whole networks or their tokens."""
    codes_BML = batch.codes_BWL
    if codes_BML is None:
        chunks_BMK = tokenizer.chunks(batch.values_BD, batch.layout, normalizer)
        codes_BML = tokenizer.encode(chunks_BMK, table.positions_MG, tokenizer.mask(batch.layout))
    seen = _TokenWindow(codes_BML, table.positions_MG, table.padding_codes_ML, None, None)
    header = prior.header(table)
    if header is None:
        return seen
    # A single window sees the header, and only independent chunks are given scales beside the tokens.
    alone_BM4 = header.chunk_scales(codes_BML).of(torch.arange(len(table), device=codes_BML.device))
    return seen._replace(scales_BW4=torch.zeros_like(alone_BM4), alone_BW4=alone_BM4)
