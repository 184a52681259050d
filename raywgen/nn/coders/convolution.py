"""Residual convolutions over each chunk folded into an image, as IGPG's tokeniser has them (arXiv 2504.02012).

The paper's coders are those of latent diffusion: a chunk of about 100,000 values becomes an image, which strided
convolutions shrink to as many pixels as it has tokens. Chunks here hold few values and have as many latents as values,
so the image keeps its size; normalisation, activation and residual blocks are the paper's (group norm, swish, two
convolutions of 3 x 3).

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features, R rows and X columns
of the image. Here N = B * M, and C counts channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from raywgen.nn.blocks import Blocks
from raywgen.nn.coders.base import Coder, silence

CHANNEL_SHARE = 4


class ConvolutionCoder(Coder):
    """An image of R x X = K values, lifted to C = H / 4 channels, which the position features shift.

    `18 C^2 + 6 C` parameters a block and `C (K + G + 22) + 1` besides (23,000 with one block at K = 16, H = 128,
    G = 98). Weights are shared between pixels, so a chunk takes about K times as many multiplications.

    Args:
        chunk_length: K; a prime number makes a signal of one row.
        num_position_features: G.
        width: H, a multiple of 4.
        num_layers: Residual blocks of two convolutions.
    """

    def __init__(self, chunk_length: int, num_position_features: int, width: int, num_layers: int) -> None:
        super().__init__()
        channels = width // CHANNEL_SHARE
        self._shape = fold(chunk_length)
        self.lift = nn.Conv2d(1, channels, 3, padding=1)
        self.position = nn.Linear(num_position_features, channels)
        # Convolutions treat all pixels alike, but each value of a chunk has a position of its own.
        self.pixel_CRX = nn.Parameter(torch.zeros(channels, *self._shape))
        self.blocks = Blocks(_ResidualConvolution(channels) for _ in range(num_layers))
        final = nn.Conv2d(channels, 1, 3, padding=1)
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), final)
        silence(final)

    @property
    def bytes_per_chunk(self) -> float:
        """Returns those of 6 numbers for each channel of a pixel in a block, and of 3 around the blocks."""
        return 4 * (6 * len(self.blocks) + 3) * self.pixel_CRX.numel()

    def forward(self, x_BMK: Tensor, positions_MG: Tensor, mask_MK: Tensor | None = None) -> Tensor:
        """Returns what is added to each chunk, as `Coder` describes."""
        real_BMK = x_BMK if mask_MK is None else x_BMK * mask_MK
        positions_BMC = self.position(positions_MG).expand(*x_BMK.shape[:2], -1)
        image_NCRX = self.lift(real_BMK.reshape(-1, 1, *self._shape))
        image_NCRX = image_NCRX + positions_BMC.reshape(-1, positions_BMC.shape[-1], 1, 1)
        image_NCRX = image_NCRX + self.pixel_CRX
        for index in range(len(self.blocks)):
            image_NCRX = self.blocks.run(index, image_NCRX)
        return self.out(image_NCRX).view(x_BMK.shape)


class _ResidualConvolution(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            _norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            _norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, image_NCRX: Tensor) -> Tensor:
        return image_NCRX + self.net(image_NCRX)


def fold(chunk_length: int) -> tuple[int, int]:
    """Rows and columns of the image nearest to a square that K values fill."""
    rows = max(row for row in range(1, math.isqrt(chunk_length) + 1) if chunk_length % row == 0)
    return rows, chunk_length // rows


def _norm(channels: int) -> nn.GroupNorm:
    # All channels in one group: in small groups, normalisation would remove what the position adds to a channel.
    return nn.GroupNorm(1, channels)
