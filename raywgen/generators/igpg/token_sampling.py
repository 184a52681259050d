"""Writes tokens: windows one after another or side by side, each chunk by chunk with a key-value cache.

Shape letters beyond the legend in `raywgen.weights`: R = B * N rows, M chunks of a network, O positions of one step.
Here N counts windows that are written at once, S the sides of guidance (with the condition, and without it), T prefix
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from raywgen.generators.common.tokenizer.chunk_table import ChunkInputs, ChunkScales
from raywgen.generators.igpg.config import SamplingConfig
from raywgen.generators.igpg.head import Codebooks
from raywgen.generators.igpg.prior import Prior
from raywgen.generators.igpg.windows import Window, WindowGroup, chunks_of, plan_groups
from raywgen.nn.decoding import PreparedTransformer, compiles
from raywgen.nn.precision import resolved
from raywgen.nn.transformer import KeyValueCache
from raywgen.weights import Condition, KeyedNoise

# On a CPU all of generation shall take a GiB; a GPU has more memory, and is busy with more windows alone.
_MAX_GIB = {"cpu": 0.6, "cuda": 16.0}
# Measured for windows of 64 and 512 chunks of several priors, and rounded up.
_WIDTHS_OF_INPUTS = 6
_COPIES_OF_VALUES = 8
_BYTES_OF_A_CODE = 40


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

    def take(self, index_X: Tensor) -> TokenSample:
        """Returns some of the chunks."""
        expected_BMK = None if self.expected_BMK is None else self.expected_BMK[:, index_X]
        return TokenSample(self.codes_BML[:, index_X], self.log_prob_BM[:, index_X], expected_BMK)

    def first(self, num: int) -> TokenSample:
        """Returns the first chunks alone."""
        expected_BMK = None if self.expected_BMK is None else self.expected_BMK[:, :num]
        return TokenSample(self.codes_BML[:, :num], self.log_prob_BM[:, :num], expected_BMK)


def sample_tokens(
    prior: Prior,
    cond: Condition,
    table: ChunkInputs,
    rvq: Codebooks,
    noise: KeyedNoise,
    temperature: float,
    sampling: SamplingConfig | None = None,
) -> TokenSample:
    """Writes the tokens of B networks, one chunk at a time with a key-value cache.

    Args:
        prior: The model that gives the tokens' probabilities.
        cond: The conditions of B networks.
        table: The inputs about the chunks of the layout.
        rvq: The quantiser's code vectors.
        noise: B rows of keyed noise.
        temperature: 0 takes the likeliest code.
        sampling: All other settings.

    Raises:
        GuidanceError: Guidance is asked for, but the prior was never trained without its condition.
    """
    writer = TokenWriter(prior, cond, table, rvq, noise, temperature, sampling or SamplingConfig())
    return joined_samples([sample for _, sample in writer.write(writer.groups, WrittenChunks())])


def joined_samples(samples: Sequence[TokenSample]) -> TokenSample:
    """Joins the samples of consecutive chunks."""
    expected = [each.expected_BMK for each in samples if each.expected_BMK is not None]
    return TokenSample(
        codes_BML=torch.cat([each.codes_BML for each in samples], dim=1),
        log_prob_BM=torch.cat([each.log_prob_BM for each in samples], dim=1),
        expected_BMK=torch.cat(expected, dim=1) if expected else None,
    )


def mean_of_adjacent(numbers_NX: Tensor, num: int) -> Tensor:
    """Returns the mean over each `num` adjacent rows, `(N / num, ...)`."""
    return numbers_NX.unflatten(0, (-1, num)).mean(dim=1) if num > 1 else numbers_NX


@dataclass(slots=True)
class WrittenChunks:
    """The tokens of earlier chunks that later ones read.

    Attributes:
        header_BYL: Tokens of all header chunks; None before they are written, and where there is no header of its own.
        recent_BWL: Tokens of the last chunks that were written; None at the beginning of a part.
    """

    header_BYL: Tensor | None = None
    recent_BWL: Tensor | None = None


class TokenWriter:
    """Writes the tokens of B networks, a group of windows after another.

    Window n of a network draws from part n of its noise, so its tokens depend neither on the windows beside it nor on
    how many are written at once. Of a written window only the tokens and their decoded values are kept. Where scales
    are given to windows, the header is written before all other chunks.

    The arguments are those of `sample_tokens`, and so are the errors.

    Attributes:
        groups: All groups of windows, in order.
    """

    @torch.no_grad()
    def __init__(
        self,
        prior: Prior,
        cond: Condition,
        table: ChunkInputs,
        rvq: Codebooks,
        noise: KeyedNoise,
        temperature: float,
        sampling: SamplingConfig,
    ) -> None:
        self._prior, self._table, self._rvq = prior, table, rvq
        self._noise, self._temperature, self._sampling = noise, temperature, sampling
        self._prefix_STH = prior.prefix(cond, table.mean_position_G)
        self._num_sides = 1 if sampling.guidance == 1 else 2
        if self._num_sides == 2:
            if prior.condition.dropped is None:
                raise GuidanceError(
                    f"guidance={sampling.guidance}: this prior was trained with prior.condition_dropout=0 and cannot "
                    "do without its condition; train it with 0.1, or leave guidance at 1"
                )
            without = cond.reading(instruction=False, samples=False)
            without_BTH = prior.prefix(without, table.mean_position_G)
            self._prefix_STH = torch.cat([self._prefix_STH, without_BTH])
        self._batch = len(self._prefix_STH) // self._num_sides
        self._header = prior.header(table)
        self.groups = token_groups(prior, table, rvq, sampling, self._batch)
        dtype = torch.bfloat16 if sampling.half_cache else None
        self._cache = prior.trunk.new_cache(len(self._prefix_STH), self._prefix_STH.shape[1], dtype)
        prior.trunk(self._prefix_STH, self._cache)
        self._prepared = _prepared(prior, self._cache, [group.windows[0] for group in self.groups], sampling)

    @torch.no_grad()
    def write(self, groups: Sequence[WindowGroup], before: WrittenChunks) -> Iterator[tuple[WindowGroup, TokenSample]]:
        """Yields consecutive groups with the tokens of their chunks.

        Args:
            groups: Some of `groups`, in order.
            before: The earlier chunks that the first of them reads; it is brought up to date.
        """
        chunk_scales = None
        for group in groups:
            if chunk_scales is None and before.header_BYL is not None and not group.is_header:
                assert self._header is not None
                chunk_scales = self._header.chunk_scales(before.header_BYL)
            sample = self._write_group(group, before.recent_BWL, chunk_scales)
            self._remember(group, sample.codes_BML, before)
            yield group, sample

    def _write_group(
        self, group: WindowGroup, recent_BWL: Tensor | None, chunk_scales: ChunkScales | None
    ) -> TokenSample:
        windows, rvq, device = group.windows, self._rvq, self._prefix_STH.device
        cache = self._cache.repeat(len(windows), self._cache.length + windows[0].stop - windows[0].start)
        index_NW = chunks_of(windows, group.part_stop, device)
        rows = _WindowRows(
            self._prior, self._prefix_STH, self._num_sides, self._table, index_NW, chunk_scales, cache, self._prepared
        )
        own_noise = self._noise.split(torch.arange(group.first, group.first + len(windows)))
        if recent_BWL is None:
            recent_BWL = torch.zeros(self._batch, 0, rvq.num_levels, dtype=torch.int64, device=device)
        tail_BOK = rvq.decode(recent_BWL[:, recent_BWL.shape[1] - group.num_tail :])
        sample = _write(rows, tail_BOK, rvq, own_noise, self._temperature, self._sampling)
        return sample.first(group.chunks.stop - group.chunks.start)

    def _remember(self, group: WindowGroup, codes_BWL: Tensor, before: WrittenChunks) -> None:
        """Keeps what later groups read of a group."""
        if group.is_header:
            earlier_BYL = [] if before.header_BYL is None else [before.header_BYL]
            before.header_BYL = torch.cat([*earlier_BYL, codes_BWL], dim=1)
        if group.chunks.stop == group.part_stop:
            before.recent_BWL = None
            return
        recent = [] if before.recent_BWL is None else [before.recent_BWL]
        recent_BWL = torch.cat([*recent, codes_BWL], dim=1)
        before.recent_BWL = recent_BWL[:, max(0, recent_BWL.shape[1] - group.longest_tail) :]


def token_groups(
    prior: Prior, table: ChunkInputs, rvq: Codebooks, sampling: SamplingConfig, batch: int
) -> list[WindowGroup]:
    """Returns the windows of B networks in groups that are written at once.

    Args:
        prior: The model that writes them.
        table: The inputs about the chunks of the layout.
        rvq: The quantiser's code vectors.
        sampling: Settings of sampling, which bound the rows and the memory of a group.
        batch: B.
    """
    num_features, num_codes = len(table.mean_position_G), rvq.num_levels * rvq.num_codes
    max_gib = sampling.max_gib or _MAX_GIB.get(table.mean_position_G.device.type, _MAX_GIB["cpu"])

    def max_rows_of(length: int) -> int:
        each = window_bytes(prior, length, num_features, num_codes, sampling)
        return max(1, min(sampling.max_rows, int(max_gib * 2**30 / each)))

    return plan_groups(len(table), prior.header(table), prior.config.window, sampling, batch, max_rows_of)


def window_bytes(prior: Prior, length: int, num_features: int, num_codes: int, sampling: SamplingConfig) -> float:
    """Returns about how many bytes it takes to write one window.

    Args:
        prior: The model that writes it.
        length: Number of its chunks.
        num_features: G, the number of position features.
        num_codes: Number of codes of all levels.
        sampling: Settings of sampling.
    """
    trunk, H, K = prior.trunk, prior.config.width, prior.previous.in_features
    num_sides = 1 if sampling.guidance == 1 else 2
    position = 2 * len(trunk.blocks) * trunk.num_kv_heads * trunk.head_width * (2 if sampling.half_cache else 4)
    cache = (length + prior.condition.num_tokens) * position
    # The inputs while they are computed, or the states that the expected code is computed from, whichever is more.
    inputs = 4 * length * (num_features + _WIDTHS_OF_INPUTS * H)
    values = 4 * length * K * _COPIES_OF_VALUES
    return num_sides * (cache + inputs) + values + _BYTES_OF_A_CODE * num_codes


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


class _WindowRows:
    """Windows written side by side: the inputs of each position, the codes of padding tokens, and the cache."""

    def __init__(
        self,
        prior: Prior,
        prefix_STH: Tensor,
        num_sides: int,
        table: ChunkInputs,
        index_NW: Tensor,
        chunk_scales: ChunkScales | None,
        cache: KeyValueCache,
        prepared: PreparedTransformer | None,
    ) -> None:
        self.prior, self.cache, self.num_sides, self.prepared = prior, cache, num_sides, prepared
        self.num_windows, self.batch = len(index_NW), len(prefix_STH) // num_sides
        self.inputs_RWH = prior.inputs(
            prefix_STH.repeat_interleave(len(index_NW), dim=0),
            prior.position(table.positions(index_NW)).repeat(len(prefix_STH), 1, 1),
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
    positions = range(num_tail, rows.inputs_RWH.shape[1])
    gumbels = noise.gumbels(len(positions), rvq.num_levels, rvq.num_codes) if temperature > 0 else repeat(None)
    for position, gumbel_RLV in zip(positions, gumbels, strict=False):
        state_SRH = rows.step(position, previous_RK.unsqueeze(1))[:, :, 0]
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
