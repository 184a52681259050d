"""The base of all coders: one call signature, each chunk's position as an input, zero until trained.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Coder(nn.Module, ABC):
    """Computes what is added to every chunk of a network; zero until trained, so a coder starts as the identity.

    Attributes:
        context: Chunks of a block, within which chunks attend to each other; 1 if each chunk is coded by itself. Blocks
            lie side by side from the first chunk of a call on, so a call must begin at a block of the network.
    """

    context: int = 1

    @property
    @abstractmethod
    def bytes_per_chunk(self) -> float:
        """Returns about how many bytes a call keeps for the backward pass, for each chunk, as measured."""

    @abstractmethod
    def forward(self, x_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """Returns what is added to each chunk, `(B, M, K)`.

        Args:
            x_BMK: Chunks.
            positions_MG: Position features of each chunk, the same for all networks or `(B, M, G)`.
            mask_MK: 1 for a value, 0 for padding, the same for all networks or `(B, M, K)`; no other chunk attends to
                a chunk of padding alone. None if there is no padding.
        """


def silence(layer: nn.Module) -> None:
    """Initialises a last layer so that it gives zeros."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
