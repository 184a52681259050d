"""Residual vector quantisation with codebooks kept as moving averages (van den Oord 2017; Zeghidour 2021).

Shape legend: N vectors, L levels, V codes of a level, K values of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all workers, in place, and returns it."""


class ResidualQuantiser(nn.Module):
    """L codebooks, each coding what the levels before it left over.

    Codebooks and their statistics are float32 buffers, never parameters: an optimiser's own master copy would
    overwrite them. `collect` gathers statistics during a step, `update` sums them over workers and moves the
    codebooks, so that all workers hold bit-equal ones.

    Args:
        num_levels: L.
        num_codes: V.
        width: K.
        decay: Weight of the past in the moving averages.
    """

    codebooks_LVK: Tensor
    counts_LV: Tensor
    sums_LVK: Tensor
    new_counts_LV: Tensor
    new_sums_LVK: Tensor

    def __init__(self, num_levels: int, num_codes: int, width: int, decay: float = 0.98) -> None:
        super().__init__()
        self.decay = decay
        shape = (num_levels, num_codes, width)
        self.register_buffer("codebooks_LVK", torch.zeros(shape))
        self.register_buffer("counts_LV", torch.ones(shape[:2]))
        self.register_buffer("sums_LVK", torch.zeros(shape))
        self.register_buffer("new_counts_LV", torch.zeros(shape[:2]), persistent=False)
        self.register_buffer("new_sums_LVK", torch.zeros(shape), persistent=False)

    @property
    def num_levels(self) -> int:
        """L."""
        return self.codebooks_LVK.shape[0]

    @property
    def num_codes(self) -> int:
        """V."""
        return self.codebooks_LVK.shape[1]

    def encode(self, vectors_NK: Tensor) -> Tensor:
        """Codes int64 `(N, L)` by greedy nearest neighbour, level after level."""
        residual_NK = vectors_NK.float()
        codes = []
        for codebook_VK in self.codebooks_LVK:
            code_N = nearest_code(residual_NK, codebook_VK)
            residual_NK = residual_NK - codebook_VK[code_N]
            codes.append(code_N)
        return torch.stack(codes, dim=-1)

    def decode(self, codes_NL: Tensor) -> Tensor:
        """The sum of the chosen code vectors, `(N, K)`; leading dimensions may be any."""
        levels = torch.arange(self.num_levels, device=codes_NL.device)
        return self.codebooks_LVK[levels, codes_NL].sum(dim=-2)

    @torch.no_grad()
    def initialise(self, vectors_NK: Tensor, num_iterations: int, generator: torch.Generator) -> None:
        """k-means, level after level, from randomly chosen vectors; revives empty codes on the way."""
        residual_NK = vectors_NK.float()
        for level in range(self.num_levels):
            codebook_VK = _kmeans(residual_NK, self.num_codes, num_iterations, generator)
            code_N = nearest_code(residual_NK, codebook_VK)
            counts_V = torch.bincount(code_N, minlength=self.num_codes).float()
            self.codebooks_LVK[level] = codebook_VK
            self.counts_LV[level] = counts_V.clamp(min=1.0)
            self.sums_LVK[level] = codebook_VK * self.counts_LV[level].unsqueeze(1)
            residual_NK = residual_NK - codebook_VK[code_N]
        # The averages must be on the scale of one step's statistics, not of the whole initial sample.
        scale = self.counts_LV.sum(dim=1, keepdim=True) / self.num_codes
        self.counts_LV /= scale
        self.sums_LVK /= scale.unsqueeze(-1)

    @torch.no_grad()
    def collect(self, vectors_NK: Tensor, codes_NL: Tensor) -> None:
        """Adds this step's assignments to the statistics."""
        residual_NK = vectors_NK.detach().float()
        for level in range(self.num_levels):
            code_N = codes_NL[:, level]
            self.new_counts_LV[level] += torch.bincount(code_N, minlength=self.num_codes)
            self.new_sums_LVK[level].index_add_(0, code_N, residual_NK)
            residual_NK = residual_NK - self.codebooks_LVK[level][code_N]

    @torch.no_grad()
    def update(self, all_reduce: AllReduce) -> None:
        """Moves the codebooks towards the collected statistics of all workers, then forgets them."""
        counts_LV = all_reduce(self.new_counts_LV)
        sums_LVK = all_reduce(self.new_sums_LVK)
        # Counts are normalised so that the decay does not depend on the batch size.
        scale_L1 = counts_LV.sum(dim=1, keepdim=True).clamp(min=1.0) / self.num_codes
        self.counts_LV.lerp_(counts_LV / scale_L1, 1 - self.decay)
        self.sums_LVK.lerp_(sums_LVK / scale_L1.unsqueeze(-1), 1 - self.decay)
        self.codebooks_LVK.copy_(self.sums_LVK / self.counts_LV.clamp(min=1e-4).unsqueeze(-1))
        self.new_counts_LV.zero_()
        self.new_sums_LVK.zero_()


def nearest_code(vectors_NK: Tensor, codebook_VK: Tensor) -> Tensor:
    """Index of the nearest code vector, int64 `(N,)`."""
    score_NV = vectors_NK @ codebook_VK.t() - 0.5 * codebook_VK.square().sum(dim=1)
    return score_NV.argmax(dim=1)


def _kmeans(vectors_NK: Tensor, num_codes: int, num_iterations: int, generator: torch.Generator) -> Tensor:
    pick = torch.randint(len(vectors_NK), (num_codes,), generator=generator).to(vectors_NK.device)
    codebook_VK = vectors_NK[pick].clone()
    for _ in range(num_iterations):
        code_N = nearest_code(vectors_NK, codebook_VK)
        counts_V = torch.bincount(code_N, minlength=num_codes)
        sums_VK = torch.zeros_like(codebook_VK).index_add_(0, code_N, vectors_NK)
        used = counts_V > 0
        codebook_VK[used] = sums_VK[used] / counts_V[used].unsqueeze(1)
        if bool((~used).any()):
            fresh = torch.randint(len(vectors_NK), (int((~used).sum()),), generator=generator)
            codebook_VK[~used] = vectors_NK[fresh.to(vectors_NK.device)]
    return codebook_VK
