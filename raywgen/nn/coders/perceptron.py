"""A residual perceptron over each chunk on its own.

Shape legend: B networks, M chunks, K values of a chunk, G place features, H width.
"""

from __future__ import annotations

from torch import Tensor, nn

from raywgen.nn.coders.base import Coder, silence


class PerceptronCoder(Coder):
    """Two hidden layers, the first of which is told the place.

    `H^2 + H (2 K + G + 3) + K` parameters (33,000 at K = 16, H = 128, G = 98), and as many multiplications a chunk.

    Args:
        chunk_length: K.
        num_position_features: G.
        width: H.
    """

    def __init__(self, chunk_length: int, num_position_features: int, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(chunk_length, width)
        self.position = nn.Linear(num_position_features, width)
        self.out = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, chunk_length))
        silence(self.out[-1])

    def forward(self, x_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """Does what `Coder` says; padding is read as it is: zero in weights, and in latents what the codes hold."""
        return self.out(self.value(x_BMK) + self.position(positions_MG))
