"""A residual perceptron over each chunk by itself.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

from torch import Tensor, nn

from raywgen.nn.coders.base import Coder, silence


class PerceptronCoder(Coder):
    """A perceptron of two hidden layers, the first of which reads the position features.

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

    @property
    def bytes_per_chunk(self) -> float:
        """Returns those of 4 numbers for each hidden unit."""
        return 4 * 4 * self.value.out_features

    def forward(self, x_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """Returns what is added to each chunk; padding is read as it is: zero in weights, in latents the codes."""
        return self.out(self.value(x_BMK) + self.position(positions_MG))
