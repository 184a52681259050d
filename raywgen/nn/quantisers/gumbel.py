"""Gumbel-softmax quantisation (Jang et al. 2017), as IGPG's tokeniser has it (arXiv 2504.02012, section 3).

    z_q = sum_j y_j e_j,    y_j = softmax_j((log pi_j + g_j) / tau)

with Gumbel noise g and an annealed temperature tau. As in the paper's released code, the forward pass takes the
one-hot of the largest y and the backward pass its softmax, a KL to the uniform prior takes the place of commitment and
codebook losses, and evaluation is always hard. The paper's logits come from an encoder of images folded from chunks;
here a linear map gives them from each of the L parts of a vector, and `initialise` makes it the posterior of a Gaussian
mixture around k-means centres, so that training starts from vector quantisation.

Shape legend: N vectors, K values of a vector, L tokens of a vector, V codes, J values of a part (K / L).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raywgen.nn.precision import autocast
from raywgen.nn.quantisers.base import AllReduce, Gumbel, Quantised, Quantiser, masked_mean, real_parts
from raywgen.nn.quantisers.kmeans import kmeans, nearest_code, whole_vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Annealing:
    """The schedule of the temperature: a falling cosine in each cycle.

    Attributes:
        start: tau at the start of each cycle.
        end: tau at the end of each cycle, and after the last one.
        steps: Optimiser steps of all cycles together.
        num_cycles: Number of cosine falls from start to end.
    """

    start: float = 1.0
    end: float = 1e-4
    steps: int = 1000
    num_cycles: int = 1


class GumbelQuantiser(Quantiser):
    """One of V code vectors for each of a vector's L parts, drawn while training.

    Args:
        num_tokens: L, parts of a vector, each with a token of its own.
        num_codes: V.
        width: K, a multiple of L.
        annealing: The schedule of the temperature.
        kl_weight: Weight of the KL to the uniform prior within the quantiser's loss.
    """

    num_updates: Tensor

    def __init__(
        self, num_tokens: int, num_codes: int, width: int, annealing: Annealing, kl_weight: float = 1e-3
    ) -> None:
        super().__init__(width)
        assert width % num_tokens == 0, f"{num_tokens} tokens do not divide {width} values"
        self._num_tokens, self.annealing, self.kl_weight = num_tokens, annealing, kl_weight
        part_width = width // num_tokens
        self.logits_of = nn.Linear(part_width, num_codes)
        self.codebook_VJ = nn.Parameter(torch.randn(num_codes, part_width))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @property
    def num_tokens(self) -> int:
        """Returns L, the number of tokens."""
        return self._num_tokens

    @property
    def num_codes(self) -> int:
        """Returns V, the number of codes."""
        return len(self.codebook_VJ)

    @property
    def num_levels(self) -> int:
        """Returns L, the number of levels."""
        return self.num_tokens

    @property
    def codebooks_LVK(self) -> Tensor:
        """Returns each token's code vectors as summands of the whole vector: zero outside its own part."""
        return summands(self.codebook_VJ, self.num_tokens)

    @property
    def num_codebook_values(self) -> int:
        """Returns how many numbers must be known to decode."""
        return self.codebook_VJ.numel()

    @property
    def temperature(self) -> float:
        """Returns tau of the next step."""
        return annealed_temperature(self.annealing, int(self.num_updates))

    def forward(
        self, vectors_NK: Tensor, mask_NK: Tensor | None = None, gumbel: Gumbel | None = None, num_groups: int = 1
    ) -> Quantised:
        """Draws codes while training, for which it needs noise, and takes the likeliest ones otherwise."""
        logits_NLV = self._logits(vectors_NK, mask_NK)
        is_real_NL = None if mask_NK is None else self.real_tokens(mask_NK).to(logits_NLV.dtype)
        loss = self.kl_weight * masked_mean(kl_to_uniform(logits_NLV), is_real_NL, num_groups)
        if not self.training:
            codes_NL = logits_NLV.argmax(dim=-1)
            return Quantised(vectors_NK=self.decode(codes_NL), codes_NL=codes_NL, loss=loss)
        assert gumbel is not None, "training samples codes: pass keyed Gumbel noise"
        gumbel_NLV = gumbel(*logits_NLV.shape[1:])
        if is_real_NL is not None:
            # Padding gets its likeliest code, as in `encode`.
            gumbel_NLV = gumbel_NLV * is_real_NL.unsqueeze(-1)
        one_hot_NLV = straight_through_sample(logits_NLV, gumbel_NLV, self.temperature)
        vectors_NK = (one_hot_NLV @ self.codebook_VJ).flatten(-2)
        return Quantised(vectors_NK=vectors_NK, codes_NL=one_hot_NLV.argmax(dim=-1), loss=loss)

    @torch.no_grad()
    def encode(self, vectors_NK: Tensor, mask_NK: Tensor | None = None) -> Tensor:
        """Returns tokens int64 `(N, L)`."""
        # In bfloat16, which only training uses, codes of nearly equal probability would tie.
        with autocast("fp32", vectors_NK.device.type):
            return self._logits(vectors_NK.float(), mask_NK).argmax(dim=-1)

    def real_tokens(self, mask_NK: Tensor) -> Tensor:
        """Returns which tokens code a real value, bool `(N, L)`."""
        return real_parts(mask_NK, self.num_tokens)

    def decode(self, codes_NL: Tensor) -> Tensor:
        """Returns reconstructions `(N, K)`; leading dimensions may be any."""
        return self.codebook_VJ[codes_NL].flatten(-2)

    @torch.no_grad()
    def initialise(
        self, vectors_NK: Tensor, num_iterations: int, generator: torch.Generator, mask_NK: Tensor | None = None
    ) -> None:
        """Fits codes by k-means; logits become the posterior `-|z - e_j|^2 / (2 sigma^2)`, sigma^2 being its error."""
        parts_XJ = self._parts(vectors_NK.float()).flatten(0, 1)
        masks_XJ = None if mask_NK is None else self._parts(mask_NK).flatten(0, 1)
        parts_XJ = whole_vectors(parts_XJ, masks_XJ)
        codebook_VJ = kmeans(parts_XJ, self.num_codes, num_iterations, generator)
        error_XJ = parts_XJ - codebook_VJ[nearest_code(parts_XJ, codebook_VJ)]
        variance = error_XJ.square().mean().clamp(min=1e-6)
        self.codebook_VJ.copy_(codebook_VJ)
        self.logits_of.weight.copy_(codebook_VJ / variance)
        self.logits_of.bias.copy_(-0.5 * codebook_VJ.square().sum(dim=1) / variance)

    @torch.no_grad()
    def update(self, all_reduce: AllReduce) -> None:
        """Takes one step of the temperature's schedule; the rest is trained by gradients."""
        self.num_updates += 1

    def _logits(self, vectors_NK: Tensor, mask_NK: Tensor | None) -> Tensor:
        return self.logits_of(self._parts(vectors_NK if mask_NK is None else vectors_NK * mask_NK))

    def _parts(self, vectors_NK: Tensor) -> Tensor:
        return vectors_NK.unflatten(-1, (self._num_tokens, -1))


def summands(codebook_VJ: Tensor, num_parts: int) -> Tensor:
    """Returns one codebook for every part of a vector, `(L, V, L * J)`; the sum of chosen ones is the vector."""
    own_LL11 = torch.eye(num_parts, device=codebook_VJ.device, dtype=codebook_VJ.dtype)[..., None, None]
    return (own_LL11 * codebook_VJ).transpose(1, 2).flatten(2)


def straight_through_sample(logits_NLV: Tensor, gumbel_NLV: Tensor, temperature: float) -> Tensor:
    """Returns the one-hot of `argmax_j(log pi_j + g_j)`, with the gradient of `softmax((log pi + g) / tau)`."""
    soft_NLV = ((logits_NLV + gumbel_NLV) / temperature).softmax(dim=-1)
    hard_NLV = nn.functional.one_hot(soft_NLV.argmax(dim=-1), soft_NLV.shape[-1]).to(soft_NLV.dtype)
    return hard_NLV + (soft_NLV - soft_NLV.detach())


def kl_to_uniform(logits_NLV: Tensor) -> Tensor:
    """Returns `sum_j q_j log(q_j V)` with `q = softmax(logits)`, nats `(N, L)`."""
    log_q_NLV = logits_NLV.log_softmax(dim=-1)
    return (log_q_NLV.exp() * (log_q_NLV + math.log(logits_NLV.shape[-1]))).sum(dim=-1)


def annealed_temperature(annealing: Annealing, step: int) -> float:
    """Returns tau after `step` optimiser steps: a cosine from start to end in every cycle."""
    if step >= annealing.steps:
        return annealing.end
    phase = (step * annealing.num_cycles / annealing.steps) % 1.0
    return annealing.end + (annealing.start - annealing.end) * (1 + math.cos(math.pi * phase)) / 2
