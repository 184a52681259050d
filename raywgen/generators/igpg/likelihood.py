"""The likelihood of a corpus' tokens under the prior, and the part of each network that a step sees.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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
    is_dropped_B2 = None
    if prior.training and config.condition_dropout > 0:
        is_dropped_B2 = dropped_parts(noise, config.condition_dropout)
    mean_position_G = tokenizer.mean_position(batch.layout)
    prefix_BTH = prior.prefix(batch.condition, mean_position_G, is_dropped_B2)
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


def dropped_parts(noise: KeyedNoise, share: float) -> Tensor:
    """Draws whose instruction and samples are left out, bool `(B, 2)`: each alone, or both, a third of `share`."""
    u_B = noise.uniform(1)[:, 0] / share
    no_instruction_B = (u_B < 1 / 3) | ((u_B >= 2 / 3) & (u_B < 1))
    no_samples_B = (u_B >= 1 / 3) & (u_B < 1)
    return torch.stack([no_instruction_B, no_samples_B], dim=1)


def _log_likelihood(prior: Prior, prefix_BTH: Tensor, seen: _TokenWindow, rvq: Codebooks) -> Tensor:
    """Returns the weighted log-probability of each token, `(B, W, L)`."""
    hidden_BWH = prior.states(prefix_BTH, seen.positions_WG, rvq.decode(seen.codes_BWL), seen.scales_BW4)
    return prior.head.log_likelihood(hidden_BWH, seen.codes_BWL, rvq, seen.padding_codes_WL) * seen.weight


def prior_windows(prior: Prior, tokenizer: Tokenizer, layout: Layout, noise: KeyedNoise) -> Windows | None:
    """Draws a random window of the prior for each network, and the blocks of chunks that its tokens follow from.

    None where all of a network is one window, and where scales are tokens, which are measured over a whole network.
    """
    count, window = tokenizer.num_chunks(layout), prior.config.window
    if not takes_windows(prior, tokenizer) or count <= window:
        return None
    return tokenizer.windows_with(layout, random_windows(noise, count, window))


def takes_windows(prior: Prior, tokenizer: Tokenizer) -> bool:
    """Whether windows suffice to train a prior: scales, where they are tokens, are measured over whole networks."""
    return prior.config.window > 0 and not tokenizer.codes_scales


@torch.no_grad()
def _seen_tokens(
    prior: Prior, tokenizer: Tokenizer, batch: WeightBatch, normalizers: NormalizerTable, noise: KeyedNoise
) -> _TokenWindow:
    """Encodes the part of each network that the step sees, and little more, or takes its stored tokens."""
    layout, normalizer = batch.layout, normalizers[batch.layout.id][1]
    if batch.windows is None and (windows := prior_windows(prior, tokenizer, layout, noise)) is not None:
        batch = batch.cut(windows)
    if (windows := batch.windows) is not None and windows.inner_BW is not None:
        index_BW, codes_BWL = windows.inner_BW, batch.codes_BWL
        if codes_BWL is None:
            chunks_BXK = tokenizer.window_chunks(batch.values_BD, windows, layout, normalizer)
            codes_BWL = tokenizer.encode_windows(chunks_BXK, layout, windows)
        return _TokenWindow(
            codes_BWL, tokenizer.positions(layout, index_BW), tokenizer.padding_codes(layout, index_BW), None, None
        )
    return _seen_of_whole(prior, tokenizer, batch, tokenizer.table(layout), normalizer, noise)


def _seen_of_whole(
    prior: Prior, tokenizer: Tokenizer, batch: WeightBatch, table: ChunkTable, normalizer: Normalizer, noise: KeyedNoise
) -> _TokenWindow:
    """Takes whole networks or their tokens; where scales are tokens, a window of each and the header."""
    B, M, window = len(batch), len(table), prior.config.window
    codes_of = _codes_of(tokenizer, batch, table, normalizer)
    if 0 < window < M:
        index_BW = random_windows(noise, M, window).to(tokenizer.device)
        positions, padding_codes = table.positions_MG[index_BW], table.padding_codes(index_BW)
        codes_BWL = codes_of(index_BW)
    else:
        index_BW = torch.arange(M, device=tokenizer.device).expand(B, -1)
        positions, padding_codes, codes_BWL = table.positions_MG, table.padding_codes_ML, codes_of(None)
    seen = _TokenWindow(codes_BWL, positions, padding_codes, None, None)
    header = prior.header(table)
    if header is None:
        return seen
    header_codes_BXL = codes_of(torch.arange(header.num, device=tokenizer.device).expand(B, -1))
    alone_BW4 = header.chunk_scales(header_codes_BXL).of_each(index_BW)
    # A window that begins within the header gets no scales beside the tokens, here as in sampling.
    is_after_B11 = (index_BW[:, :1, None] >= header.num).to(alone_BW4.dtype)
    return seen._replace(scales_BW4=alone_BW4 * is_after_B11, alone_BW4=alone_BW4)


def _codes_of(
    tokenizer: Tokenizer, batch: WeightBatch, table: ChunkTable, normalizer: Normalizer
) -> Callable[[Tensor | None], Tensor]:
    """Returns the function that gives the tokens of some chunks of each network, int64 `(B, W)`, or with None of all.

    It encodes no other chunks than these.
    """
    layout, stored_BML = batch.layout, batch.codes_BWL
    rows_B1 = torch.arange(len(batch), device=tokenizer.device).unsqueeze(1)
    if stored_BML is not None:
        return lambda index_BW: stored_BML if index_BW is None else stored_BML[rows_B1, index_BW]
    chunks_BMK = tokenizer.chunks(batch.values_BD, layout, normalizer)

    def encode(index_BW: Tensor | None) -> Tensor:
        if index_BW is None:
            return tokenizer.encode(chunks_BMK, table.positions_MG, tokenizer.mask(layout))
        return tokenizer.encode_windows(chunks_BMK[rows_B1, index_BW], layout, tokenizer.windows_with(layout, index_BW))

    return encode
