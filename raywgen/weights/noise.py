"""Noise keyed by the global sample index, so that the number of workers does not change it.

The generator is splitmix64 (Steele, Lea, Flood 2014) used as a counter-based hash: value `i` of draw `k` for
sample `s` depends on (seed, stage, k, s, i) alone, never on how samples are spread over workers or batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_NUM_BITS = 24  # of each draw: what a float32 holds exactly
_ALL_BITS = (1 << 64) - 1
_FEW = 1 << 16
# Beyond this many values one draw gives some noticeably more often than others, and beyond 2**24 some never.
_COARSE = 1 << 16


class KeyedNoise:
    """Draws one row of noise per sample.

    Args:
        seed: The run's seed.
        sample_index_B: Global index of each sample in the run, int64 `(B,)`.
        stream: Separates uses of the same samples, for instance one per stage.
    """

    def __init__(self, seed: int, sample_index_B: Tensor, stream: int = 0) -> None:
        self._key_B = _mix(_mix(sample_index_B.to(torch.int64) + _mix_int(seed)) + _mix_int(stream))
        self._num_draws = 0

    def split(self, index_N: Tensor, stream: int = 0) -> KeyedNoise:
        """Returns noise of `B * N` rows, N adjacent rows for every sample; part 0 draws the noise of the sample itself.

        The noise of a part depends on its index and stream alone, not on the other parts.

        Args:
            index_N: Indices of the parts, int64, from 0.
            stream: Separates ways of splitting the same samples.
        """
        parts = copy(self)
        index_N = index_N.to(self._key_B.device)
        key_BN = self._key_B.unsqueeze(1)
        parts._key_B = torch.where(index_N == 0, key_BN, _mix(key_BN ^ _mix(index_N + _mix_int(stream)))).flatten()
        return parts

    def to(self, device: torch.device) -> KeyedNoise:
        """Returns the noise that goes on after these draws on another device, with the same values."""
        moved = copy(self)
        moved._key_B = self._key_B.to(device)
        return moved

    def first(self, num: int) -> KeyedNoise:
        """Returns the noise of the first `num` samples."""
        rows = copy(self)
        rows._key_B = self._key_B[:num]
        return rows

    def take(self, index_N: Tensor) -> KeyedNoise:
        """Returns the noise of some samples, selected by index."""
        rows = copy(self)
        rows._key_B = self._key_B[index_N.to(self._key_B.device)]
        return rows

    def uniform(self, *shape: int) -> Tensor:
        """Draws float32 `(B, *shape)` from the open interval (0, 1)."""
        return _uniform(self._bits(shape))

    def normal(self, *shape: int) -> Tensor:
        """Draws standard normal float32 `(B, *shape)`."""
        return torch.erfinv(self.uniform(*shape).mul_(2).sub_(1)).mul_(math.sqrt(2.0))

    def gumbel(self, *shape: int) -> Tensor:
        """Draws standard Gumbel float32 `(B, *shape)`."""
        return -torch.log(-torch.log(self.uniform(*shape)))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draws int64 `(B, *shape)` from `[0, high)`, for `high` up to 2**38."""
        scaled = self._bits(shape) * high
        if high > _COARSE:
            scaled += (self._bits(shape) * high) >> _NUM_BITS
        return scaled >> _NUM_BITS

    def gumbels(self, num: int, *shape: int) -> Iterator[Tensor]:
        """Yields what `num` calls of `gumbel` would return; small draws are computed several at a time."""
        at_once = max(1, _FEW // max(1, len(self._key_B) * math.prod(shape)))
        for start in range(0, num, at_once):
            bits = self._bits(shape, min(at_once, num - start))
            yield from (-torch.log(-torch.log(_uniform(bits)))).unflatten(0, (-1, len(self._key_B)))

    def _bits(self, shape: tuple[int, ...], num: int = 1) -> Tensor:
        """Draws int64 `(num * B, *shape)` from `[0, 2**24)`, draw after draw."""
        key_B, count = self._key_B, math.prod(shape)
        number = torch.arange(self._num_draws + 1, self._num_draws + num + 1, device=key_B.device)
        self._num_draws += num
        draw_X = _mix(key_B + number.unsqueeze(1) * 1_000_003).flatten()
        bits = _mix(draw_X.unsqueeze(1) + torch.arange(count, device=key_B.device) * _GOLDEN)
        top_bits = (bits >> (64 - _NUM_BITS)) & ((1 << _NUM_BITS) - 1)
        return top_bits.reshape(len(draw_X), *shape)


def _uniform(bits: Tensor) -> Tensor:
    return (bits.float() + 0.5).mul_(2.0**-_NUM_BITS).clamp_(max=1.0 - 2.0**-_NUM_BITS)


def _mix(state: Tensor) -> Tensor:
    if type(state) is Tensor and state.device.type == "cpu" and state.numel() <= _FEW:
        return torch.from_numpy(_mix_few(state.numpy().view(np.uint64)).view(np.int64))
    state = state + _GOLDEN
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _MIX_1
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _MIX_2
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def _mix_few(state: np.ndarray) -> np.ndarray:
    """Returns `_mix` in fewer passes than torch takes, each with less around it; but by one thread."""
    state = state.copy()
    state += np.uint64(_GOLDEN & _ALL_BITS)
    state ^= state >> np.uint64(30)
    state *= np.uint64(_MIX_1 & _ALL_BITS)
    state ^= state >> np.uint64(27)
    state *= np.uint64(_MIX_2 & _ALL_BITS)
    state ^= state >> np.uint64(31)
    return state


def _mix_int(value: int) -> int:
    """Returns `_mix` of a number, without a tensor, as it is asked for several times a batch."""
    state = (value + _GOLDEN) & _ALL_BITS
    state = ((state ^ (state >> 30)) * _MIX_1) & _ALL_BITS
    state = ((state ^ (state >> 27)) * _MIX_2) & _ALL_BITS
    state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state
