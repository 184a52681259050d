"""Residual vector quantisation with codebooks kept as moving averages (van den Oord 2017; Zeghidour 2021).

With one level it is vector quantisation. Codes are found level after level, by greedy search or by beam search over
the levels (Babenko and Lempitsky 2014), which keeps the best few partial sums.

Shape legend: N vectors, L levels, V codes of a level, K values of a vector, W paths of a beam.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.nn.passes import rows_of_a_pass
from raywgen.nn.quantisers.base import AllReduce, Quantiser
from raywgen.nn.quantisers.kmeans import code_gain, kmeans, nearest_code, whole_vectors

# The scores of a pass over vectors stay near a core; on other devices they need only fit into memory.
_CPU_SCORES_OF_A_PASS = 1 << 18
_SCORES_OF_A_PASS = 1 << 22
_HASH = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


class ResidualQuantiser(Quantiser):
    """L codebooks, each of which codes the remainder of the levels before it.

    Args:
        num_levels: L, number of codebooks.
        num_codes: V, codes of a codebook.
        width: K, values of a vector.
        decay: Weight of the past in the moving averages.
        beam: W, number of partial sums that encoding keeps; 1 is greedy.
        revive_below: Share of the mean use below which a code is put on a vector of the batch; 0 lets codes die.
    """

    codebooks_LVK: Tensor
    counts_LV: Tensor
    sums_LVK: Tensor
    new_counts_LV: Tensor
    new_sums_LVK: Tensor
    candidates_LVK: Tensor

    def __init__(
        self,
        num_levels: int,
        num_codes: int,
        width: int,
        decay: float = 0.98,
        *,
        beam: int = 1,
        revive_below: float = 0.0,
    ) -> None:
        super().__init__(width)
        self.decay = decay
        self.beam = beam
        self.revive_below = revive_below
        shape = (num_levels, num_codes, width)
        self.register_buffer("codebooks_LVK", torch.zeros(shape))
        self.register_buffer("counts_LV", torch.ones(shape[:2]))
        self.register_buffer("sums_LVK", torch.zeros(shape))
        self.register_buffer("new_counts_LV", torch.zeros(shape[:2]), persistent=False)
        self.register_buffer("new_sums_LVK", torch.zeros(shape), persistent=False)
        self.register_buffer("candidates_LVK", torch.zeros(shape if revive_below > 0 else (0,)), persistent=False)

    @property
    def num_levels(self) -> int:
        """Returns L, the number of levels."""
        return self.codebooks_LVK.shape[0]

    @property
    def num_tokens(self) -> int:
        """Returns L, the number of tokens."""
        return self.num_levels

    @property
    def num_codes(self) -> int:
        """Returns V, the number of codes."""
        return self.codebooks_LVK.shape[1]

    @property
    def num_codebook_values(self) -> int:
        """Returns `L * V * K`, the numbers of all codebooks."""
        return self.codebooks_LVK.numel()

    @torch.no_grad()
    def encode(self, vectors_NK: Tensor, mask_NK: Tensor | None = None) -> Tensor:
        """Returns codes int64 `(N, L)` by nearest neighbour level after level, or by beam search over the levels."""
        if self.beam > 1 and self.num_levels > 1:
            return self._encode_by_beam(vectors_NK.float(), mask_NK)
        residual_NK = vectors_NK.float().clone()
        codes = []
        for codebook_VK in self.codebooks_LVK:
            codes.append(nearest_code(residual_NK, codebook_VK, mask_NK))
            residual_NK -= codebook_VK.index_select(0, codes[-1])
        return torch.stack(codes, dim=-1)

    def decode(self, codes_NL: Tensor) -> Tensor:
        """Returns the sum of the chosen code vectors, `(N, K)`; leading dimensions may be any."""
        first_L = self.num_codes * torch.arange(self.num_levels, device=codes_NL.device)
        chosen_XK = self.codebooks_LVK.flatten(0, 1).index_select(0, (codes_NL + first_L).flatten())
        return chosen_XK.view(*codes_NL.shape, self.width).sum(dim=-2)

    @torch.no_grad()
    def initialise(
        self, vectors_NK: Tensor, num_iterations: int, generator: torch.Generator, mask_NK: Tensor | None = None
    ) -> None:
        """Fits level after level by k-means from random vectors without padding, and revives empty codes."""
        residual_NK = whole_vectors(vectors_NK, mask_NK).float()
        for level in range(self.num_levels):
            codebook_VK = kmeans(residual_NK, self.num_codes, num_iterations, generator)
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
    def collect(self, vectors_NK: Tensor, codes_NL: Tensor, mask_NK: Tensor | None = None) -> None:
        """Adds this step's assignments to the statistics."""
        residual_NK = vectors_NK.detach().float()
        for level in range(self.num_levels):
            code_N = codes_NL[:, level]
            chosen_NK = self.codebooks_LVK[level][code_N]
            if mask_NK is not None:
                # Padding counts as the code's own value, which does not move the code.
                residual_NK = torch.where(mask_NK > 0, residual_NK, chosen_NK)
            self.new_counts_LV[level] += torch.bincount(code_N, minlength=self.num_codes)
            self.new_sums_LVK[level].index_add_(0, code_N, residual_NK)
            if self.revive_below > 0:
                self.candidates_LVK[level] = self._some_of(residual_NK)
            residual_NK = residual_NK - chosen_NK

    @torch.no_grad()
    def update(self, all_reduce: AllReduce) -> None:
        """Moves the codebooks towards the collected statistics of all workers, then forgets them."""
        counts_LV = all_reduce(self.new_counts_LV)
        sums_LVK = all_reduce(self.new_sums_LVK)
        # Counts are normalised so that the decay does not depend on the batch size.
        scale_L1 = counts_LV.sum(dim=1, keepdim=True).clamp(min=1.0) / self.num_codes
        self.counts_LV.lerp_(counts_LV / scale_L1, 1 - self.decay)
        self.sums_LVK.lerp_(sums_LVK / scale_L1.unsqueeze(-1), 1 - self.decay)
        if self.revive_below > 0:
            self._revive(all_reduce)
        self.codebooks_LVK.copy_(self.sums_LVK / self.counts_LV.clamp(min=1e-4).unsqueeze(-1))
        self.new_counts_LV.zero_()
        self.new_sums_LVK.zero_()

    def _revive(self, all_reduce: AllReduce) -> None:
        """Puts dead codes on vectors of the batch, the same ones on all workers.

        Workers share sums only. So each worker fills a candidate's slot with probability 1 / (number of workers), and
        a slot is used if exactly one worker has filled it.
        """
        num_workers = float(all_reduce(torch.ones(1, device=self.counts_LV.device)))
        filled_LV = _share_of_hash(self.candidates_LVK) * num_workers < 1
        num_filled_LV = all_reduce(filled_LV.float())
        candidates_LVK = all_reduce(self.candidates_LVK * filled_LV.unsqueeze(-1))
        for level in range(self.num_levels):
            dead_D = (self.counts_LV[level] < self.revive_below).nonzero().flatten()
            fresh_VK = candidates_LVK[level][num_filled_LV[level] == 1]
            dead_D = dead_D[: len(fresh_VK)]
            self.counts_LV[level, dead_D] = 1.0
            self.sums_LVK[level, dead_D] = fresh_VK[: len(dead_D)]

    def _some_of(self, vectors_NK: Tensor) -> Tensor:
        """Picks V vectors at even distances in the batch, from a start that the batch decides."""
        start = int(_hash(vectors_NK[:1]).abs()) % len(vectors_NK)
        step = max(1, len(vectors_NK) // self.num_codes)
        rows_V = start + step * torch.arange(self.num_codes, device=vectors_NK.device)
        return vectors_NK[rows_V % len(vectors_NK)]

    def _encode_by_beam(self, vectors_NK: Tensor, mask_NK: Tensor | None) -> Tensor:
        most = _CPU_SCORES_OF_A_PASS if vectors_NK.device.type == "cpu" else _SCORES_OF_A_PASS
        rows = rows_of_a_pass(len(vectors_NK), self.beam * self.num_codes, most)
        masks = [None] * len(vectors_NK) if mask_NK is None else mask_NK.split(rows)
        parts = zip(vectors_NK.split(rows), masks, strict=False)
        return torch.cat([self._beam(part_NK, real_NK) for part_NK, real_NK in parts])

    def _beam(self, vectors_NK: Tensor, mask_NK: Tensor | None) -> Tensor:
        N, V = len(vectors_NK), self.num_codes
        residual_NWK = vectors_NK.unsqueeze(1)
        # A path's gain is by how much it lowers half the squared error of a zero reconstruction.
        gain_NW = vectors_NK.new_zeros(N, 1)
        codes_NWL = torch.zeros(N, 1, 0, dtype=torch.int64, device=vectors_NK.device)
        for codebook_VK in self.codebooks_LVK:
            mask_N1K = None if mask_NK is None else mask_NK.unsqueeze(1)
            gain_NWV = code_gain(residual_NWK, codebook_VK, mask_N1K).add_(gain_NW.unsqueeze(-1))
            gain_NW, best_NW = gain_NWV.flatten(1).topk(min(self.beam, gain_NWV[0].numel()), dim=1)
            path_NW, code_NW = best_NW // V, best_NW % V
            rows_N1 = torch.arange(N, device=vectors_NK.device).unsqueeze(1)
            residual_NWK = residual_NWK[rows_N1, path_NW] - codebook_VK[code_NW]
            codes_NWL = torch.cat([codes_NWL[rows_N1, path_NW], code_NW.unsqueeze(-1)], dim=-1)
        return codes_NWL[:, 0]


def _hash(vectors_XK: Tensor) -> Tensor:
    """Returns an int64 hash `(X,)` of the bits of each vector."""
    return (vectors_XK.contiguous().view(torch.int32).sum(dim=-1) * _HASH) >> 32


def _share_of_hash(vectors_XK: Tensor) -> Tensor:
    """Returns a number in [0, 1) from the bits of each vector, float32 `(X,)`."""
    return (_hash(vectors_XK) & 0xFFFF).float() / (1 << 16)
