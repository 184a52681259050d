"""Writes tokens: windows one after another or side by side, each chunk by chunk with a key-value cache.

Shape letters beyond the legend in `raywgen.weights`: R = B * N rows, M chunks of a network, O positions of one step.
Here N counts windows that are written at once, S the sides of guidance (with the condition, and without it), T prefix
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.generators.common.tokenizer.chunk_table import ChunkScales, ChunkTable
from raywgen.generators.igpg.config import SamplingConfig
from raywgen.generators.igpg.head import Codebooks
from raywgen.generators.igpg.prior import Prior
from raywgen.generators.igpg.windows import Window, chunks_of, plan_parts, side_by_side
from raywgen.nn.decoding import PreparedTransformer, compiles
from raywgen.nn.precision import resolved
from raywgen.nn.transformer import KeyValueCache
from raywgen.weights import Condition, KeyedNoise


class GuidanceError(ValueError):
    """Guidance was asked of a prior that was never trained without its condition."""


@dataclass(frozen=True, slots=True)
class TokenSample:
    """Tokens that the prior wrote.

    Attributes:
        codes_BML: Tokens, int64.
        log_prob_BM: Log-probability of each chunk's tokens in nats, at temperature 1, given the condition, with nothing
            truncated.
        expected_BMK: The expected code along the tokens; None where only tokens were asked for.
    """

    codes_BML: Tensor
    log_prob_BM: Tensor
    expected_BMK: Tensor | None

    def first(self, num: int) -> TokenSample:
        """Returns the first chunks alone."""
        expected_BMK = None if self.expected_BMK is None else self.expected_BMK[:, :num]
        return TokenSample(self.codes_BML[:, :num], self.log_prob_BM[:, :num], expected_BMK)


def sample_tokens(
    prior: Prior,
    cond: Condition,
    table: ChunkTable,
    rvq: Codebooks,
    noise: KeyedNoise,
    temperature: float,
    sampling: SamplingConfig | None = None,
) -> TokenSample:
    """Writes the tokens of B networks, one chunk at a time with a key-value cache.

    Args:
        prior: The model that gives the tokens' probabilities.
        cond: The conditions of B networks.
        table: All chunks of the layout.
        rvq: The quantiser's code vectors.
        noise: B rows of keyed noise.
        temperature: 0 takes the likeliest code.
        sampling: All other settings.

    Raises:
        GuidanceError: Guidance is asked for, but the prior was never trained without its condition.
    """
    sampling = sampling or SamplingConfig()
    prefix_STH = prior.prefix(cond, table.mean_position_G)
    if sampling.guidance != 1:
        if prior.condition.dropped is None:
            raise GuidanceError(
                f"guidance={sampling.guidance}: this prior was trained with prior.condition_dropout=0 and cannot "
                "do without its condition; train it with 0.1, or leave guidance at 1"
            )
        all_B2 = torch.ones(len(cond), 2, dtype=torch.bool, device=prefix_STH.device)
        prefix_STH = torch.cat([prefix_STH, prior.prefix(cond, table.mean_position_G, all_B2)])
    return _sample_windows(prior, prefix_STH, table, rvq, noise, temperature, sampling)


@torch.no_grad()
def _sample_windows(
    prior: Prior,
    prefix_STH: Tensor,
    table: ChunkTable,
    rvq: Codebooks,
    noise: KeyedNoise,
    temperature: float,
    sampling: SamplingConfig,
) -> TokenSample:
    """Writes all chunks of B networks.

    Window n of a network draws from part n of its noise, so its tokens depend neither on the windows beside it nor on
    how many are written at once. Of a written window only the tokens and their decoded values are kept. Where scales
    are given to windows, the header is written before all other chunks.

    Args:
        prior: The model that gives the tokens' probabilities.
        prefix_STH: Condition tokens of B networks, `(S * B, T, H)`; the second side, if any, has no condition.
        table: All chunks of the layout.
        rvq: The quantiser's code vectors.
        noise: B rows of keyed noise.
        temperature: 0 takes the likeliest code.
        sampling: All other settings.
    """
    num_sides = 1 if sampling.guidance == 1 else 2
    B = len(prefix_STH) // num_sides
    dtype = torch.bfloat16 if sampling.half_cache else None
    prefix_cache = prior.trunk.new_cache(len(prefix_STH), prefix_STH.shape[1], dtype)
    prior.trunk(prefix_STH, prefix_cache)
    header, done = prior.header(table), 0
    parts = plan_parts(len(table), header, prior.config.window, sampling)
    groups_of_parts = [side_by_side(part.plan, B, sampling.max_rows) for part in parts]
    prepared = _prepared(prior, prefix_cache, [group[0] for groups in groups_of_parts for group in groups], sampling)
    written: list[TokenSample] = []
    for part, groups in zip(parts, groups_of_parts, strict=True):
        chunk_scales = header.chunk_scales(_codes_of(written)) if header is not None and written else None
        longest_tail = max(window.new - window.start for window in part.plan)
        recent_BML = torch.zeros(B, 0, rvq.num_levels, dtype=torch.int64, device=prefix_STH.device)
        for group in groups:
            cache = prefix_cache.repeat(len(group), prefix_cache.length + group[0].stop - group[0].start)
            index_NW = chunks_of(group, part.stop, prefix_STH.device)
            rows = _WindowRows(prior, prefix_STH, num_sides, table, index_NW, chunk_scales, cache, prepared)
            own_noise = noise.split(torch.arange(done, done + len(group)))
            num_recent = recent_BML.shape[1]
            tail_BOK = rvq.decode(recent_BML[:, num_recent - (group[0].new - group[0].start) :])
            num_new = min(group[-1].stop, part.stop) - group[0].new
            written.append(_write(rows, tail_BOK, rvq, own_noise, temperature, sampling).first(num_new))
            recent_BML = torch.cat([recent_BML, written[-1].codes_BML], dim=1)
            recent_BML = recent_BML[:, max(0, recent_BML.shape[1] - longest_tail) :]
            done += len(group)
    expected = [each.expected_BMK for each in written if each.expected_BMK is not None]
    return TokenSample(
        codes_BML=_codes_of(written),
        log_prob_BM=torch.cat([each.log_prob_BM for each in written], dim=1),
        expected_BMK=torch.cat(expected, dim=1) if expected else None,
    )


def _prepared(
    prior: Prior, prefix: KeyValueCache, firsts: list[Window], sampling: SamplingConfig
) -> PreparedTransformer | None:
    """Returns the trunk as it takes single steps, by the first window of each group; None to call it as it is."""
    device = prefix.keys.device
    num_steps = sum(window.stop - window.new for window in firsts)
    compiled = compiles(sampling.compile, num_steps, device)
    dtype = _matrix_dtype(sampling, device)
    if not compiled and dtype == torch.float32:
        return None
    length = prefix.length + max(window.stop - window.start for window in firsts)
    return PreparedTransformer(prior.trunk, length, dtype, compiled=compiled)


def _matrix_dtype(sampling: SamplingConfig, device: torch.device) -> torch.dtype:
    """Returns the type in which matrices are multiplied."""
    return torch.bfloat16 if resolved(sampling.precision, device.type) == "bf16" else torch.float32


def _codes_of(written: list[TokenSample]) -> Tensor:
    return torch.cat([each.codes_BML for each in written], dim=1)


class _WindowRows:
    """Windows written side by side: the inputs of each position, the codes of padding tokens, and the cache."""

    def __init__(
        self,
        prior: Prior,
        prefix_STH: Tensor,
        num_sides: int,
        table: ChunkTable,
        index_NW: Tensor,
        chunk_scales: ChunkScales | None,
        cache: KeyValueCache,
        prepared: PreparedTransformer | None,
    ) -> None:
        self.prior, self.cache, self.num_sides, self.prepared = prior, cache, num_sides, prepared
        self.num_windows, self.batch = len(index_NW), len(prefix_STH) // num_sides
        self.inputs_RWH = prior.inputs(
            prefix_STH.repeat_interleave(len(index_NW), dim=0),
            prior.position(table.positions_MG[index_NW]).repeat(len(prefix_STH), 1, 1),
            None if chunk_scales is None else chunk_scales.of(index_NW).flatten(0, 1).repeat(num_sides, 1, 1),
        )
        self.padding_codes_RWL = table.padding_codes(index_NW.repeat(self.batch, 1))

    def step(self, first: int, before_ROK: Tensor) -> Tensor:
        """Returns states `(S, R, O, H)` of the O positions from `first` on, given the code vector before each."""
        inputs = self.inputs_RWH[:, first : first + before_ROK.shape[1]]
        before = self.prior.previous(before_ROK).repeat(self.num_sides, 1, 1)
        if self.prepared is None or before_ROK.shape[1] > 1:
            states = self.prior.trunk(inputs + before, self.cache)
        else:
            states = self.prepared.step((inputs + before)[:, 0], self.cache).unsqueeze(1)
        return states.unflatten(0, (self.num_sides, -1))


def _write(
    rows: _WindowRows, tail_BOK: Tensor, rvq: Codebooks, noise: KeyedNoise, temperature: float, sampling: SamplingConfig
) -> TokenSample:
    """Writes the new chunks of a group of windows, `(B, N * W)`, with those beyond the end of their part."""
    head, num_tail = rows.prior.head, tail_BOK.shape[1]
    previous_RK = tail_BOK.new_zeros(rows.batch * rows.num_windows, rvq.codebooks_LVK.shape[2])
    if num_tail:
        # The window's first chunk reads no chunk before it, here as in training.
        rows.step(0, torch.cat([torch.zeros_like(tail_BOK[:, :1]), tail_BOK[:, :-1]], dim=1))
        previous_RK = tail_BOK[:, -1]
    levels = head.levels(rvq)
    levels = levels._replace(weight_LHV=levels.weight_LHV.to(_matrix_dtype(sampling, tail_BOK.device)))
    codes, states, log_probs = [], [], []
    for position in range(num_tail, rows.inputs_RWH.shape[1]):
        state_SRH = rows.step(position, previous_RK.unsqueeze(1))[:, :, 0]
        gumbel_RLV = noise.gumbel(rvq.num_levels, rvq.num_codes) if temperature > 0 else None
        padding_codes_RL = None if rows.padding_codes_RWL is None else rows.padding_codes_RWL[:, position]
        code_RL, previous_RK, log_prob_R = head.draw(
            state_SRH, levels, gumbel_RLV, temperature, sampling, padding_codes_RL
        )
        codes.append(code_RL)
        log_probs.append(log_prob_R)
        if sampling.decoding == "expected":
            states.append(state_SRH)
    expected_BMK = None
    if states:
        # In pieces, because the probabilities of all codes at all positions would take more memory than the cache.
        pieces = torch.stack(states, dim=2).flatten(1, 2).split(sampling.max_rows, dim=1)
        padding_codes: tuple[Tensor | None, ...] = (None,) * len(pieces)
        if rows.padding_codes_RWL is not None:
            padding_codes = rows.padding_codes_RWL[:, num_tail:].flatten(0, 1).split(sampling.max_rows)
        expected = [
            head.expected_latents(
                conditional, rvq, *unconditional, guidance=sampling.guidance, padding_codes_XL=padding_codes_XL
            )
            for (conditional, *unconditional), padding_codes_XL in zip(pieces, padding_codes, strict=True)
        ]
        expected_BMK = torch.cat(expected).unflatten(0, (rows.batch, -1))
    return TokenSample(
        codes_BML=torch.stack(codes, dim=1).unflatten(0, (rows.batch, -1)).flatten(1, 2),
        log_prob_BM=torch.stack(log_probs, dim=1).unflatten(0, (rows.batch, -1)).flatten(1, 2),
        expected_BMK=expected_BMK,
    )
