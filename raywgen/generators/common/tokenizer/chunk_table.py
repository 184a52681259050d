"""The inputs of the prior about a layout's chunks, beside the condition.

**Padding tokens.** Where each token codes its own part of a chunk, some tokens of a partly filled chunk hold nothing
but padding. Their code is known beforehand: it is that of zeros. The encoder writes it, the prior gives it all
probability, and no likelihood counts it.

**Header tokens.** Where scales are tokens, they fill the header: the first chunks of a network. Only windows that hold
the header see these tokens. Every chunk of a later window gets four numbers instead: the scale and the mean at its
first and at its last value, decoded from the header. That is equally much for a chunk of any network.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features, Y numbers of the
header, X indices in any shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NUM_CHUNK_SCALES = 4
"""The number of scales and means that a chunk is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkScales:
    """The scales and means of each chunk's values, for networks whose header is known.

    Attributes:
        numbers_BY: The decoded numbers of the header, and a 0 at the end, which stands for a missing number.
        scale_index: As in `HeaderChunks`.
    """

    numbers_BY: Tensor
    scale_index: Callable[[Tensor], Tensor]

    def of(self, index_X: Tensor) -> Tensor:
        """Returns the numbers for the same chunks of all networks, `(B, X, 4)`."""
        return self.numbers_BY[:, self.scale_index(index_X)]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderChunks:
    """The first chunks of a network's token sequence, which hold its scales and means.

    Attributes:
        num: Number of header chunks.
        decode: Takes their tokens `(B, num, L)` and returns normalised chunks.
        scale_index: Returns which of the header's numbers, laid side by side, scale the values of some chunks, as
            `ScaledChunks.scale_index` does.
    """

    num: int
    decode: Callable[[Tensor], Tensor]
    scale_index: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def chunk_scales(self, codes_BML: Tensor) -> ChunkScales:
        """Returns the scales of the chunks of networks whose tokens begin with the given ones."""
        numbers_BY = self.decode(codes_BML[:, : self.num]).flatten(1)
        return ChunkScales(numbers_BY=torch.nn.functional.pad(numbers_BY, (0, 1)), scale_index=self.scale_index)


class ChunkInputs(Protocol):
    """The inputs about the chunks of one layout, of which any part can be asked for."""

    def __len__(self) -> int:
        """Returns the number of chunks, M."""
        ...

    @property
    def header(self) -> HeaderChunks | None:
        """The header chunks; None where scales are no tokens."""
        ...

    @property
    def mean_position_G(self) -> Tensor:
        """The mean of the chunks' position features."""
        ...

    def positions(self, index_X: Tensor | slice) -> Tensor:
        """Returns the position features of some chunks, `(X, G)`."""
        ...

    def padding_codes(self, index_X: Tensor | slice) -> Tensor | None:
        """Returns the codes of padding tokens of some chunks `(X, L)`, -1 for other tokens; None if there are none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTable:
    """The inputs about all chunks of one layout, held in memory.

    Attributes:
        positions_MG: Position features of each chunk.
        padding_codes_ML: The codes of padding tokens, int64, and -1 for all other tokens; None without padding tokens.
        header: The header chunks; None where scales are no tokens.
    """

    positions_MG: Tensor
    padding_codes_ML: Tensor | None = None
    header: HeaderChunks | None = None

    def __len__(self) -> int:
        return len(self.positions_MG)

    @property
    def mean_position_G(self) -> Tensor:
        """The mean of the chunks' position features."""
        return self.positions_MG.mean(dim=0)

    def positions(self, index_X: Tensor | slice) -> Tensor:
        """Returns `positions_MG` of some chunks, `(X, G)`."""
        return self.positions_MG[index_X]

    def padding_codes(self, index_X: Tensor | slice) -> Tensor | None:
        """Returns `padding_codes_ML` of some chunks, `(X, L)`."""
        return None if self.padding_codes_ML is None else self.padding_codes_ML[index_X]

    @property
    def num_real_tokens(self) -> int | None:
        """The number of a network's tokens that hold a value; None where all do."""
        return None if self.padding_codes_ML is None else int((self.padding_codes_ML < 0).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedChunkTable:
    """The inputs about the chunks of a large layout, each computed when it is asked for.

    Attributes:
        num_chunks: M.
        mean_position_G: The mean of the chunks' position features.
        positions_of: Returns the position features of some chunks, `(X, G)`.
        padding_codes_of: Returns the codes of padding tokens of some chunks, `(X, L)`, or None.
        header: The header chunks; None where scales are no tokens.
    """

    num_chunks: int
    mean_position_G: Tensor
    positions_of: Callable[[Tensor], Tensor]
    padding_codes_of: Callable[[Tensor], Tensor | None]
    header: HeaderChunks | None = None

    def __len__(self) -> int:
        return self.num_chunks

    def positions(self, index_X: Tensor | slice) -> Tensor:
        """Returns the position features of some chunks, `(X, G)`."""
        return self.positions_of(self._index(index_X))

    def padding_codes(self, index_X: Tensor | slice) -> Tensor | None:
        """Returns the codes of padding tokens of some chunks, `(X, L)`."""
        return self.padding_codes_of(self._index(index_X))

    def _index(self, index_X: Tensor | slice) -> Tensor:
        if isinstance(index_X, slice):
            return torch.arange(*index_X.indices(self.num_chunks), device=self.mean_position_G.device)
        return index_X
