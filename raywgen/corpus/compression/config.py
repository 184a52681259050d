"""Settings of the codec that compresses corpora."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CountEqually = Literal["tensors", "values"]


@dataclass(kw_only=True)
class CodecConfig:
    """Settings by which a network is written within a budget of bits.

    Attributes:
        bits_per_value: Most bits per value of a network, everything counted.
        count_equally: The things whose relative errors count equally: `tensors`, which keeps what networks compute, or
            `values`, which gives the best signal to noise.
        min_values: Least number of values of a tensor that the trellis writes; smaller ones, and any of one dimension,
            go on an even grid of `small_bits` per value.
        small_bits: Bits of a value on that grid. At 8 in place of 10 the answers of a ResNet-20 diverge twice as far.
        state_bits: Logarithm of the trellis's number of states. More states come closer to the rate-distortion bound
            and take two to four times as long with every two bits; at 4 bits a value 12 gain nothing over 10.
        vector_length: Number of values that are rotated and coded together, a power of two.
    """

    bits_per_value: float = 4.25
    count_equally: CountEqually = "tensors"
    min_values: int = 1024
    small_bits: int = 10
    state_bits: int = 10
    vector_length: int = 256

    def __post_init__(self) -> None:
        if self.bits_per_value <= 0 or not 2 <= self.small_bits <= 16 or self.min_values < 1:
            raise ValueError(
                f"bits_per_value={self.bits_per_value}, small_bits={self.small_bits}, min_values={self.min_values}: "
                "give above 0, from 2 to 16, and at least 1"
            )
        if not 1 <= self.state_bits <= 16:
            raise ValueError(f"state_bits={self.state_bits}: give 1 to 16")
        if self.vector_length < 32 or self.vector_length & (self.vector_length - 1):
            raise ValueError(f"vector_length={self.vector_length}: give a power of two of at least 32")
