"""A residual perceptron over each chunk by itself.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywgen.nn.coders.base import Coder, silence
from raywgen.nn.passes import rows_of_a_pass

# The hidden units of a pass over chunks stay near a core. Nothing is kept of them where no gradient is asked for.
_UNITS_OF_A_PASS = 1 << 18


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
        B, M = x_BMK.shape[:2]
        rows = rows_of_a_pass(M, B * self.value.out_features, _UNITS_OF_A_PASS)
        if torch.is_grad_enabled() or x_BMK.device.type != "cpu" or rows >= M:
            return self._added(x_BMK, positions_MG)
        parts = zip(x_BMK.split(rows, dim=1), positions_MG.split(rows, dim=-2), strict=True)
        return torch.cat([self._added(x_BRK, positions_RG) for x_BRK, positions_RG in parts], dim=1)

    def _added(self, x_BMK: Tensor, positions_MG: Tensor) -> Tensor:
        return self.out(self.value(x_BMK) + self.position(positions_MG))
