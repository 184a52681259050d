"""The base of all coders: one call signature, each chunk's position as an input, zero until trained.

Shape legend: B networks, M chunks, K values of a chunk, G place features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Coder(nn.Module, ABC):
    """A map to what is added to every chunk of a network; zero until trained, so that a coder begins as the identity.

    Attributes:
        context: Chunks of a block, within which chunks see each other. Blocks lie side by side from the first chunk of
            a call on, so a call must begin where a block of the network begins; 1 where a chunk sees itself alone.
    """

    context: int = 1

    @abstractmethod
    def forward(self, x_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """`(B, M, K)`, what to add.

        Args:
            x_BMK: Chunks.
            positions_MG: What is known of each chunk's place, the same in all networks or `(B, M, G)`.
            mask_MK: 1 for a real value, 0 for padding, likewise; a chunk of padding alone is seen by no other. None
                where all is real.
        """


def silence(layer: nn.Module) -> None:
    """Makes a last layer give zeros."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
