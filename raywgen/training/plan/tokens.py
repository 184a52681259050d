"""The tokens of a network by their number of levels: bits, what they keep, and the time to generate them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.generators import DataSpec, GenerationRequest, Generator
from raywgen.generators.reporting import Kept, kept_at
from raywgen.weights import Condition, KeyedNoise, Layout

_BITS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
_VALUES_OF_A_PIECE = 1 << 18
# A first piece that takes longer says enough: starting and compiling are little of it.
_LONG_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A number of levels.

    Attributes:
        num_levels: Tokens of a chunk.
        bits_per_value: Their bits over the values of the network.
        num_tokens: Tokens of the network.
        kept: What published networks keep at as many bits; None beyond what was measured.
    """

    num_levels: int
    bits_per_value: float
    num_tokens: int
    kept: Kept | None


@dataclass(frozen=True, kw_only=True)
class PlannedTokens:
    """The tokens of the largest network.

    Attributes:
        num_levels: The run's own number of levels.
        rows: That one and others, by ascending bits.
        windows_bytes: Memory of the windows that are written at once, beside the generator, on a CPU.
    """

    num_levels: int
    rows: tuple[TokenRow, ...]
    windows_bytes: float


def planned_tokens(generator: Generator, layout: Layout) -> PlannedTokens | None:
    """Returns the tokens of a network of a layout; None where the generator writes none."""
    code, encoder = generator.weight_code(), generator.token_encoder()
    if code is None or encoder is None:
        return None
    num_chunks, bits = encoder.num_chunks(layout), math.log2(code.num_codes)
    by_bits = (round(each * layout.num_values / (num_chunks * bits)) for each in _BITS)
    rows = []
    for num_levels in sorted({code.num_levels, *(levels for levels in by_bits if levels)}):
        bits_per_value = num_levels * bits * num_chunks / layout.num_values
        rows.append(
            TokenRow(
                num_levels=num_levels,
                bits_per_value=bits_per_value,
                num_tokens=num_levels * num_chunks,
                kept=kept_at(bits_per_value),
            )
        )
    _, windows_bytes = generator.bytes_at_once(layout, generator.resolve_sampling(None), 1)
    return PlannedTokens(num_levels=code.num_levels, rows=tuple(rows), windows_bytes=windows_bytes)


@torch.no_grad()
def values_per_second(generator: Generator, layout: Layout, data: DataSpec) -> float:
    """Returns the values of a network that a generator writes in a second, here.

    Of a large network only one or two pieces are written. The first is not timed unless it takes long.
    """
    sampling = generator.resolve_sampling(None)
    request = GenerationRequest(
        condition=_condition(data), layout=layout, noise=KeyedNoise(0, torch.zeros(1, dtype=torch.int64))
    )
    pieces = generator.pieces(layout, sampling, 1, _VALUES_OF_A_PIECE)
    if len(pieces) == 1:
        pieces = [*pieces, *pieces]
    kept: dict[int, Mapping[str, Tensor]] = {}
    has_begun = False
    rate = 0.0
    for piece in pieces:
        needed = {name: tensor for index in piece.needs for name, tensor in kept[index].items()}
        begin = time.perf_counter()
        kept[piece.index] = generator.generate_piece(request, piece, needed).kept
        seconds = time.perf_counter() - begin
        if piece.num_values:
            rate = piece.num_values / seconds
            if has_begun or seconds > _LONG_SECONDS:
                break
            has_begun = True
    return rate


def _condition(data: DataSpec) -> Condition:
    return Condition(
        instructions=("Which class does the sample belong to?",),
        samples_BSF=torch.zeros(1, 1, data.num_features),
        labels_BS=torch.zeros(1, 1, dtype=torch.int64),
        policies=(data.policies[0],) if data.policies else (),
    )
