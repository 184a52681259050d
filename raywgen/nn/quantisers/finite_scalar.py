"""Finite scalar quantisation (Mentzer et al. 2023): every value is bounded, then rounded to one of a few levels.

    i = round(h * (tanh(z / g) + 1)),    h = (levels - 1) / 2

The paper shifts an even grid so that 0 is a grid point; weights lie evenly around 0, so the grid here is symmetric. Its
decoder is learned and takes the grid itself; here a level stands for the mean of the values that fall on it, so that
decoding needs no network. Until `initialise` has seen data, width g and means are the best for a unit Gaussian.

Shape legend: N vectors, K values of a vector, L tokens of a vector, V levels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raywgen.nn.quantisers.base import Gumbel, Quantised, Quantiser, real_parts
from raywgen.nn.quantisers.gumbel import summands


class FiniteScalarQuantiser(Quantiser):
    """Quantises every value on its own.

    Args:
        num_points: Levels of a value; a value costs `log2(num_points)` bits.
        values_per_token: Values whose levels make one of `num_points ** values_per_token` codes.
        width: K, a multiple of `values_per_token`.
    """

    gain: Tensor
    points_V: Tensor

    def __init__(self, num_points: int, values_per_token: int, width: int) -> None:
        super().__init__(width)
        assert width % values_per_token == 0, f"{values_per_token} values per token do not divide {width}"
        self.num_points, self.values_per_token = num_points, values_per_token
        gain, points_V = gaussian_levels(num_points)
        self.register_buffer("gain", torch.tensor(gain))
        self.register_buffer("points_V", points_V.float())

    @property
    def num_tokens(self) -> int:
        """Returns L, the number of tokens."""
        return self.width // self.values_per_token

    @property
    def num_codes(self) -> int:
        """Returns V, the number of codes."""
        return self.num_points**self.values_per_token

    @property
    def num_levels(self) -> int:
        """Returns L, the number of levels."""
        return self.num_tokens

    @property
    def codebooks_LVK(self) -> Tensor:
        """Returns each token's code vectors as summands of the whole vector: zero outside its own part."""
        codes_V1 = torch.arange(self.num_codes, device=self.points_V.device).unsqueeze(1)
        return summands(self.decode(codes_V1), self.num_tokens)

    @property
    def num_codebook_values(self) -> int:
        """Returns how many numbers must be known to decode."""
        return self.points_V.numel() + 1

    def forward(
        self, vectors_NK: Tensor, mask_NK: Tensor | None = None, gumbel: Gumbel | None = None, num_groups: int = 1
    ) -> Quantised:
        """Quantises with straight-through gradients and without a loss of its own."""
        quantised = super().forward(vectors_NK, mask_NK, gumbel, num_groups)
        return quantised._replace(loss=vectors_NK.new_zeros(()))

    @torch.no_grad()
    def encode(self, vectors_NK: Tensor, mask_NK: Tensor | None = None) -> Tensor:
        """Returns tokens int64 `(N, L)`."""
        real_NK = vectors_NK if mask_NK is None else vectors_NK * mask_NK
        grouped = self._levels(real_NK.float()).unflatten(-1, (-1, self.values_per_token))
        return (grouped * self._place_values(grouped.device)).sum(dim=-1)

    def real_tokens(self, mask_NK: Tensor) -> Tensor:
        """Returns which tokens code a real value, bool `(N, L)`."""
        return real_parts(mask_NK, self.num_tokens)

    def decode(self, codes_NL: Tensor) -> Tensor:
        """Returns reconstructions `(N, K)`; leading dimensions may be any."""
        place_values = self._place_values(codes_NL.device)
        return self.points_V[(codes_NL.unsqueeze(-1) // place_values) % self.num_points].flatten(-2)

    @torch.no_grad()
    def initialise(
        self, vectors_NK: Tensor, num_iterations: int, generator: torch.Generator, mask_NK: Tensor | None = None
    ) -> None:
        """Fits g to the values' scale and the points to the means of their cells; there is nothing to iterate."""
        value_X = vectors_NK.float().flatten() if mask_NK is None else vectors_NK.float()[mask_NK > 0]
        gain, points_V = gaussian_levels(self.num_points)
        deviation = value_X.square().mean().sqrt().clamp(min=1e-12)
        self.gain.copy_(gain * deviation)
        level_X = self._levels(value_X)
        counts_V = torch.bincount(level_X, minlength=self.num_points)
        sums_V = torch.zeros_like(self.points_V).index_add_(0, level_X, value_X)
        gaussian_V = points_V.to(self.points_V) * deviation
        self.points_V.copy_(torch.where(counts_V > 0, sums_V / counts_V.clamp(min=1), gaussian_V))

    def _levels(self, values: Tensor) -> Tensor:
        half = (self.num_points - 1) / 2
        return torch.round(half * (torch.tanh(values / self.gain) + 1)).to(torch.int64)

    def _place_values(self, device: torch.device) -> Tensor:
        exponent = torch.arange(self.values_per_token, device=device)
        return self.num_points**exponent


def gaussian_levels(num_levels: int) -> tuple[float, Tensor]:
    """Returns width g and points float64 `(V,)` with the least squared error on a unit Gaussian.

    The error is `1 - sum_i P_i c_i^2` with cell means `c_i = (phi(a_i) - phi(b_i)) / P_i`, exactly; g is searched on a
    grid of steps of 1 %.
    """
    gains_G = torch.exp(torch.arange(-70, 200, dtype=torch.float64) / 100)
    # Cell i ends where h * (tanh(z / g) + 1) = i + 1/2.
    inner = torch.arange(1, num_levels, dtype=torch.float64) * 2 - num_levels
    edges_GE = gains_G.unsqueeze(1) * torch.atanh(inner / (num_levels - 1))
    ends_GE = torch.nn.functional.pad(edges_GE, (1, 0), value=-math.inf)
    ends_GE = torch.nn.functional.pad(ends_GE, (0, 1), value=math.inf)
    from_GV, to_GV = ends_GE[:, :-1], ends_GE[:, 1:]
    # In the upper half both terms are near 1, so the mirrored cell is computed there.
    is_upper_GV = from_GV > 0
    low_GV, high_GV = torch.where(is_upper_GV, -to_GV, from_GV), torch.where(is_upper_GV, -from_GV, to_GV)
    probability_GV = _below(high_GV) - _below(low_GV)
    density_GE = torch.exp(-0.5 * edges_GE.square()) / math.sqrt(2 * math.pi)
    moment_GV = -torch.nn.functional.pad(density_GE, (1, 1)).diff(dim=1)
    means_GV = moment_GV / probability_GV.clamp(min=1e-300)
    best = int((moment_GV * means_GV).sum(dim=1).argmax())
    return float(gains_G[best]), means_GV[best]


def _below(value: Tensor) -> Tensor:
    """Returns the normal distribution function, accurate far below 0 too, where `torch.special.ndtr` gives 0."""
    return 0.5 * torch.special.erfc(-value / math.sqrt(2))
