"""Trellis-coded quantisation on a bitshift trellis (Tseng et al. 2024, "QTIP", section 3; Mao and Gray 2010).

A value costs k bits; its state is the last S bits written, its reconstruction `table[state]`. So each value is one of
2^S, though only k bits were spent on it, and the Viterbi algorithm finds the best path. Sequences are tail-biting: the
bits before the first value are the last ones of the sequence, so that no start state has to be stored.

The table holds the quantiles of a Gaussian. QTIP puts them in random order; here the states among which a path can
choose are spread over the whole range, as Ungerboeck's rules spread the branches of a trellis. On a unit Gaussian at 2
bits and 2^12 states that takes the gap to the rate-distortion bound from 0.72 to 0.53 dB. The variance is a little
above the `1 - 2^(-2k)` of an optimal reproduction, for the sake of the tails. No training is needed, and centroids
gained nothing more.

Shape legend: N sequences, K values of a sequence, L tokens of a sequence, Q states (2^S), P their prefixes (2^(S-k)),
A symbols (2^k).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WIDENING = 1.1
_COSTS_IN_CACHE = 1 << 18
_COSTS_IN_MEMORY = 1 << 24


@dataclass(kw_only=True)
class TrellisConfig:
    """Sizes of a trellis.

    Attributes:
        bits: k, the number of bits of a value.
        state_bits: S. On a Gaussian at 2 bits 8, 10 and 12 leave 0.93, 0.70 and 0.53 dB to the rate-distortion bound,
            and encoding takes two to four times as long with every step; at 4 bits 10 leaves 1.0 dB and 12 no less.
        values_per_token: Values whose bits make one token of `bits * values_per_token` bits.
        seed: Seed of the table's order.
    """

    bits: int = 4
    state_bits: int = 10
    values_per_token: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits < 1 or self.state_bits < self.bits or self.state_bits > 20:
            raise ValueError(f"bits={self.bits}, state_bits={self.state_bits}: give 1 <= bits <= state_bits <= 20")
        if self.values_per_token < 1 or self.bits * self.values_per_token > 24:
            raise ValueError(
                f"values_per_token={self.values_per_token}: a token holds bits * values_per_token, at most 24 bits"
            )


class TrellisQuantiser:
    """Codes each vector as one stream of bits.

    Args:
        config: Sizes of the trellis.
        width: K; a multiple of `values_per_token`, with `width * bits >= state_bits`.
    """

    def __init__(self, config: TrellisConfig, width: int) -> None:
        if width % config.values_per_token or width * config.bits < config.state_bits:
            raise ValueError(
                f"width={width}: give a multiple of values_per_token={config.values_per_token} "
                f"that holds at least state_bits={config.state_bits} bits"
            )
        self.config = config
        self.width = width
        self.table_Q = gaussian_table(config)

    @property
    def num_tokens(self) -> int:
        """Returns L, the number of tokens of a vector."""
        return self.width // self.config.values_per_token

    @property
    def bits_per_token(self) -> int:
        """Returns the number of bits of a token; every token is below two to this power."""
        return self.config.bits * self.config.values_per_token

    @torch.no_grad()
    def encode(self, vectors_NK: Tensor) -> Tensor:
        """Returns tokens int64 `(N, L)` of the best tail-biting path, as QTIP finds it (section 3.2, algorithm 4).

        The path through the sequence turned by half gives the state where the ends meet; the second search starts
        and ends there.
        """
        rows = _rows_of_a_pass(self.width, self.config)
        symbols_NK = torch.cat([self._best_symbols(part_NK) for part_NK in vectors_NK.float().split(rows)])
        return _join(symbols_NK, self.config.bits, self.config.values_per_token)

    def decode(self, codes_NL: Tensor) -> Tensor:
        """Returns reconstructions `(N, K)`; leading dimensions may be any."""
        return self.table_Q[self.states(codes_NL)]

    def states(self, codes_NL: Tensor) -> Tensor:
        """Returns the state of every value, int64 `(..., K)`: a window of the bits that end at it."""
        bits, state_bits = self.config.bits, self.config.state_bits
        symbols_NK = _split(codes_NL, bits, self.config.values_per_token)
        state_NK = symbols_NK
        for back in range(1, -(-state_bits // bits)):
            state_NK = state_NK | (symbols_NK.roll(back, dims=-1) << (bits * back))
        return state_NK & ((1 << state_bits) - 1)

    def _best_symbols(self, values_NK: Tensor) -> Tensor:
        bits, state_bits = self.config.bits, self.config.state_bits
        half = self.width // 2
        turned_NK = viterbi(values_NK.roll(half, 1), self.table_Q, bits)
        # In the turned sequence the value before the first stands at half - 1: its prefix is where the ends meet.
        overlap_N = turned_NK[:, half - 1] & ((1 << (state_bits - bits)) - 1)
        states_NK = viterbi(values_NK, self.table_Q, bits, overlap_N)
        return states_NK & ((1 << bits) - 1)


def viterbi(values_NK: Tensor, table_Q: Tensor, bits: int, overlap_N: Tensor | None = None) -> Tensor:
    """Returns the states int64 `(N, K)` of the path with the least squared error.

    Args:
        values_NK: Sequences, float32.
        table_Q: Reconstruction of each state.
        bits: k, the number of bits of a value.
        overlap_N: The S - k bits that precede the first symbol and end the last state; None leaves both free.
    """
    num_sequences, length = values_NK.shape
    num_states, num_symbols = len(table_Q), 1 << bits
    num_prefixes = num_states // num_symbols
    # (value - table)^2 without the value's own square, which is the same on every path: one small product a step.
    terms_Q2 = torch.stack([table_Q.square(), -2 * table_Q], dim=1)
    values_K2N = torch.stack([torch.ones_like(values_NK), values_NK]).permute(2, 0, 1).contiguous()
    # The least cost of a path to each prefix before a step; tracing back needs nothing else.
    best_KPN = values_NK.new_zeros(length, num_prefixes, num_sequences)
    if overlap_N is not None:
        best_KPN[0].fill_(torch.inf).scatter_(0, overlap_N.unsqueeze(0), 0.0)
    cost_QN = values_NK.new_empty(num_states, num_sequences)
    for step in range(length):
        torch.mm(terms_Q2, values_K2N[step], out=cost_QN)
        cost_QN.view(num_prefixes, num_symbols, -1).add_(best_KPN[step].unsqueeze(1))
        if step + 1 < length:
            # The predecessors of prefix p are the states that end in p: they differ in their highest k bits.
            torch.amin(cost_QN.view(num_symbols, num_prefixes, -1), dim=0, out=best_KPN[step + 1])
    if overlap_N is None:
        last_N = cost_QN.argmin(dim=0)
    else:
        last_AN = _states_ending_in(overlap_N, num_symbols, num_prefixes)
        last_N = last_AN.gather(0, cost_QN.gather(0, last_AN).argmin(dim=0, keepdim=True))[0]
    return _trace_back(last_N, best_KPN, values_K2N, terms_Q2)


def _trace_back(last_N: Tensor, best_KPN: Tensor, values_K2N: Tensor, terms_Q2: Tensor) -> Tensor:
    num_states, num_prefixes = len(terms_Q2), best_KPN.shape[1]
    num_symbols = num_states // num_prefixes
    states = [last_N]
    for step in range(len(best_KPN) - 2, -1, -1):
        before_AN = _states_ending_in(states[-1] // num_symbols, num_symbols, num_prefixes)
        terms_AN2 = terms_Q2[before_AN]
        cost_AN = (terms_AN2 * values_K2N[step].t()).sum(dim=2)
        cost_AN += best_KPN[step].gather(0, before_AN // num_symbols)
        states.append(before_AN.gather(0, cost_AN.argmin(dim=0, keepdim=True))[0])
    return torch.stack(states[::-1], dim=1)


def _states_ending_in(prefix_N: Tensor, num_symbols: int, num_prefixes: int) -> Tensor:
    """Returns the states `(A, N)` whose low S - k bits are given."""
    high_A1 = torch.arange(num_symbols, device=prefix_N.device).unsqueeze(1) * num_prefixes
    return high_A1 + prefix_N


def gaussian_table(config: TrellisConfig) -> Tensor:
    """Returns float32 `(Q,)`: Gaussian quantiles, placed so that the states of every choice lie far apart.

    The quantiles fall into 2^k strata. Of the states that follow one another's prefix (lowest k bits differ), and of
    those that lead to the same prefix (highest k bits differ), each lies in another stratum, at the same place within
    it; the place follows from the bits in between in random order.
    """
    num_states, num_symbols = 1 << config.state_bits, 1 << config.bits
    num_prefixes = num_states // num_symbols
    state_Q = torch.arange(num_states)
    stratum_Q = state_Q % num_symbols
    if config.state_bits >= 2 * config.bits:
        stratum_Q = (stratum_Q + state_Q // num_prefixes) % num_symbols
    order_P = torch.randperm(num_prefixes, generator=torch.Generator().manual_seed(config.seed))
    rank_Q = stratum_Q * num_prefixes + order_P[state_Q // num_symbols]
    quantile_Q = torch.special.ndtri((torch.arange(num_states, dtype=torch.float64) + 0.5) / num_states)
    deviation = _WIDENING * (1 - 4.0**-config.bits) ** 0.5
    return (quantile_Q * (deviation / quantile_Q.square().mean().sqrt()))[rank_Q].float()


def _rows_of_a_pass(width: int, config: TrellisConfig) -> int:
    """Returns how many sequences are searched at once: few enough for a core's cache, and for 64 MiB of best costs."""
    in_cache = max(16, _COSTS_IN_CACHE >> config.state_bits)
    return max(1, min(in_cache, _COSTS_IN_MEMORY // (width << (config.state_bits - config.bits))))


def _join(symbols_NK: Tensor, bits: int, values_per_token: int) -> Tensor:
    grouped = symbols_NK.unflatten(-1, (-1, values_per_token))
    return (grouped << _shifts(bits, values_per_token, symbols_NK.device)).sum(dim=-1)


def _split(codes_NL: Tensor, bits: int, values_per_token: int) -> Tensor:
    shifts = _shifts(bits, values_per_token, codes_NL.device)
    return ((codes_NL.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _shifts(bits: int, values_per_token: int, device: torch.device) -> Tensor:
    """Returns the shift of each value in a token, whose first value has the highest bits."""
    return torch.arange(values_per_token - 1, -1, -1, device=device) * bits
