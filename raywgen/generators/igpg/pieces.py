"""Pieces of large networks: groups of windows, whose values are decoded as soon as their tokens are written.

Windows of `windows=parallel`, and chunks that are independent, do not read each other, so that pieces of them can be
written in any order. A window of `windows=sequential` reads the last tokens of the window before, so that its piece
needs the piece before. Where scales are tokens, the header is a piece without values, which all others need.

Shape letters beyond the legend in `raywgen.weights`: Y header chunks, X values of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raywgen.generators.igpg.token_sampling import WrittenChunks
from raywgen.generators.igpg.windows import WindowGroup
from raywgen.generators.pieces import Piece, joined_units

HEADER_CHUNKS = "header_chunks"
_HEADER_CODES, _RECENT_CODES = "header_codes", "recent_codes"


def pieces_of(
    groups: Sequence[WindowGroup], num_header_chunks: int, chunk_length: int, num_values: int, max_values: int
) -> list[Piece]:
    """Returns the pieces of a network, each a run of whole groups.

    Args:
        groups: All groups of the network.
        num_header_chunks: Number of chunks before those of the values; where there are some, the first groups write
            them and nothing else.
        chunk_length: K.
        num_values: D.
        max_values: Most values of a piece; a group that has more is a piece of its own.
    """
    num_first = sum(group.is_header for group in groups)
    header = [Piece(index=0, start=0, stop=0, units=(0, num_first))] if num_first else []
    others = groups[num_first:]
    sizes = [(group.chunks.stop - group.chunks.start) * chunk_length for group in others]
    is_chain = any(group.num_tail for group in others)
    pieces = list(header)
    for first, end in joined_units(sizes, max_values):
        before = [pieces[-1].index] if is_chain and len(pieces) > len(header) else []
        start, stop = others[first].chunks.start, others[end - 1].chunks.stop
        pieces.append(
            Piece(
                index=len(pieces),
                start=(start - num_header_chunks) * chunk_length,
                stop=min((stop - num_header_chunks) * chunk_length, num_values),
                units=(num_first + first, num_first + end),
                needs=(*(piece.index for piece in header), *before),
            )
        )
    return pieces


def earlier_chunks(kept: Mapping[str, Tensor], device: torch.device) -> WrittenChunks:
    """Returns the tokens that a piece reads from those that it needs."""
    header_BYL, recent_BWL = kept.get(_HEADER_CODES), kept.get(_RECENT_CODES)
    return WrittenChunks(
        header_BYL=None if header_BYL is None else header_BYL.to(device, torch.int64),
        recent_BWL=None if recent_BWL is None else recent_BWL.to(device, torch.int64),
    )


def kept_chunks(written: WrittenChunks, header_BYK: Tensor | None) -> dict[str, Tensor]:
    """Returns what a piece keeps for others.

    Args:
        written: The tokens after the piece.
        header_BYK: The header's decoded chunks, from the piece that writes them.
    """
    kept = {}
    if header_BYK is not None:
        assert written.header_BYL is not None
        kept = {HEADER_CHUNKS: header_BYK, _HEADER_CODES: written.header_BYL.to(torch.int32)}
    if written.recent_BWL is not None and written.recent_BWL.shape[1]:
        kept[_RECENT_CODES] = written.recent_BWL.to(torch.int32)
    return kept
