"""The interface by which tokens of whole corpora are made and stored, so that later stages need not encode anything.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from raywgen.weights import Layout, Windows
from raywgen.weights.groups import ReadValues


class TokenEncoder(ABC):
    """Turns weights into tokens by a trained, frozen tokeniser.

    Attributes:
        chunk_length: K.
        num_levels: L, tokens of a chunk.
        num_codes: V, codes that a token can take.
    """

    chunk_length: int
    num_levels: int
    num_codes: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Returns where the tokeniser is now."""

    @abstractmethod
    def digest(self) -> str:
        """Returns 32 hex digits that identify everything that decides tokens; reads all of it."""

    @abstractmethod
    def layout(self, layout_id: str) -> Layout | None:
        """Returns a layout that the tokeniser was trained on, in its order; None for an unknown one."""

    @abstractmethod
    def num_chunks(self, layout: Layout) -> int:
        """Returns M, the length of a network's token sequence in chunks."""

    @abstractmethod
    def windows(self, layout: Layout, first: int, stop: int, num: int) -> Windows | None:
        """Returns the part of `num` networks that the tokens of their chunks `first` to `stop - 1` follow from.

        None means that tokens follow from whole networks alone.
        """

    def moments(self, layout: Layout, read: ReadValues) -> Tensor | None:
        """Returns the moments of each network that its windows follow from, beside their values.

        Args:
            layout: Layout of the networks.
            read: Reads their values, a part at a time.

        Returns:
            Float `(B, N)`, on the tokeniser's device; None where windows follow from their values alone.
        """
        return None

    @abstractmethod
    def encode(
        self, values_BX: Tensor, layout: Layout, windows: Windows | None, moments_BN: Tensor | None = None
    ) -> Tensor:
        """Returns the tokens `(B, W, L)`, int64, of the inner chunks of windows, or of whole networks.

        Args:
            values_BX: The values of the windows, zeros beyond the ends of a network; whole flat vectors without
                windows. As `windows`, on the tokeniser's device.
            layout: Layout of the networks.
            windows: The result of the method of this name.
            moments_BN: The result of the method of this name.
        """
