"""What the prior is told of a layout's chunks, beside the condition.

**Padding.** Where each token codes its own part of a chunk, some tokens of a partly filled chunk hold nothing but
padding. They are no part of any likelihood. Their code is known before: that of zeros, for which padding is taken in
encoding, so that tokens read and tokens written are the same, and what is decoded there stays small. The prior gives it
all probability.

Shape legend: M chunks, L levels, G place features, X indices in any shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTable:
    """Of all chunks of one layout.

    Attributes:
        places_MG: What is known of each chunk's place.
        forced_ML: Codes of the tokens that hold nothing but padding, int64, and -1 for all others; None where there
            are no such tokens.
    """

    places_MG: Tensor
    forced_ML: Tensor | None = None

    def __len__(self) -> int:
        return len(self.places_MG)

    def forced(self, index_X: Tensor | slice) -> Tensor | None:
        """`forced_ML` of some chunks, `(X, L)`."""
        return None if self.forced_ML is None else self.forced_ML[index_X]

    @property
    def num_real_tokens(self) -> int | None:
        """Tokens of a network that hold a value; None where all do."""
        return None if self.forced_ML is None else int((self.forced_ML < 0).sum())
