"""The inputs of the prior about a layout's chunks, beside the condition.

**Padding.** Where each token codes its own part of a chunk, some tokens of a partly filled chunk hold nothing but
padding. They are no part of any likelihood. Their code is known before: that of zeros, for which padding is taken in
encoding, so that tokens read and tokens written are the same, and what is decoded there stays small. The prior gives it
all probability.

**Scales.** Where scales are tokens, only windows that hold the leading chunks see them. A window that begins after
these is told, at every chunk, the numbers that its values are written in: the scale and the mean at its first and at
its last value, as the leading chunks' tokens are decoded. That is as much for a chunk of any network, however long.

Shape legend: B networks, M chunks, W chunks of a window, L levels, G place features, Y numbers of the leading chunks, F
of them that a chunk is told, X indices in any shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_OWN = 4
"""F."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnNumbers:
    """The inputs of each chunk for networks whose leading chunks are known.

    Attributes:
        numbers_BY: Decoded, and a 0 for none.
        own_MF: As in `LeadingChunks`.
    """

    numbers_BY: Tensor
    own_MF: Tensor

    def of(self, index_X: Tensor) -> Tensor:
        """Selects the same chunks of all networks, `(B, X, F)`."""
        return self.numbers_BY[:, self.own_MF[index_X]]

    def of_each(self, index_BW: Tensor) -> Tensor:
        """Selects each network's own chunks, `(B, W, F)`."""
        rows_B11 = torch.arange(len(index_BW), device=index_BW.device)[:, None, None]
        return self.numbers_BY[rows_B11, self.own_MF[index_BW]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadingChunks:
    """Returns the numbers of scales and means.

    Attributes:
        num: How many there are.
        decode: From their tokens `(B, num, L)` to what these say, normalised chunks.
        own_MF: Which of the numbers, laid side by side, each chunk is told, int64; -1 for none, as of the leading
            chunks themselves.
    """

    num: int
    decode: Callable[[Tensor], Tensor]
    own_MF: Tensor

    @torch.no_grad()
    def own(self, codes_BML: Tensor) -> OwnNumbers:
        """Returns the inputs for networks whose tokens begin with the given ones."""
        numbers_BY = self.decode(codes_BML[:, : self.num]).flatten(1)
        return OwnNumbers(numbers_BY=torch.nn.functional.pad(numbers_BY, (0, 1)), own_MF=self.own_MF)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTable:
    """The inputs about all chunks of one layout.

    Attributes:
        places_MG: What is known of each chunk's place.
        forced_ML: Codes of the tokens that hold nothing but padding, int64, and -1 for all others; None where there
            are no such tokens.
        leading: The leading chunks; None where there are none.
    """

    places_MG: Tensor
    forced_ML: Tensor | None = None
    leading: LeadingChunks | None = None

    def __len__(self) -> int:
        return len(self.places_MG)

    def forced(self, index_X: Tensor | slice) -> Tensor | None:
        """`forced_ML` of some chunks, `(X, L)`."""
        return None if self.forced_ML is None else self.forced_ML[index_X]

    @property
    def num_real_tokens(self) -> int | None:
        """Tokens of a network that hold a value; None where all do."""
        return None if self.forced_ML is None else int((self.forced_ML < 0).sum())
