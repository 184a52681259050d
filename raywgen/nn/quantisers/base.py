"""The base of all quantisers: one call signature, codes as tokens, statistics that are equal on all workers.

Shape legend: N vectors, K values of a vector, L tokens of a vector, V codes of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all workers, in place, and returns it."""

Gumbel = Callable[..., Tensor]
"""`gumbel(*shape)` draws standard Gumbel noise, float32 `(N, *shape)`, one row for each vector of the call."""


class Quantised(NamedTuple):
    """The result of quantising vectors.

    Attributes:
        vectors_NK: Reconstructions; gradients pass straight through to the input.
        codes_NL: Tokens, int64.
        loss: Scalar loss of the quantiser, to be added to the reconstruction error.
    """

    vectors_NK: Tensor
    codes_NL: Tensor
    loss: Tensor


class Quantiser(nn.Module, ABC):
    """Maps vectors to tokens and back.

    State that moves without gradients is kept in float32 buffers, never in parameters: an optimiser's own master copy
    would overwrite them. `collect` gathers statistics during a step; `update` sums them over workers and moves the
    state, so that it is bit-equal on all workers. A mask is 1 for a real value and 0 for padding, which does not
    affect codes, statistics or losses.

    Args:
        width: K, values of a vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Returns L, the number of tokens."""

    @property
    @abstractmethod
    def num_codes(self) -> int:
        """Returns V, the number of codes."""

    @property
    def num_codebook_values(self) -> int:
        """Returns how many numbers must be known to decode."""
        return 0

    def forward(
        self, vectors_NK: Tensor, mask_NK: Tensor | None = None, gumbel: Gumbel | None = None, num_groups: int = 1
    ) -> Quantised:
        """Quantises vectors, and collects statistics while training.

        Args:
            vectors_NK: Float vectors.
            mask_NK: 1 for a real value, 0 for padding.
            gumbel: Noise for a quantiser that samples its codes while training; others ignore it.
            num_groups: Number of groups, of equally many vectors each, that have the same weight in the loss however
                many of their values are real.
        """
        codes_NL = self.encode(vectors_NK, mask_NK)
        if self.training:
            self.collect(vectors_NK, codes_NL, mask_NK)
        decoded_NK = self.decode(codes_NL).to(vectors_NK.dtype)
        straight_through_NK = vectors_NK + (decoded_NK - vectors_NK).detach()
        loss = masked_mean((vectors_NK - decoded_NK.detach()).square(), mask_NK, num_groups)
        return Quantised(vectors_NK=straight_through_NK, codes_NL=codes_NL, loss=loss)

    @abstractmethod
    def encode(self, vectors_NK: Tensor, mask_NK: Tensor | None = None) -> Tensor:
        """Returns tokens int64 `(N, L)`."""

    def real_tokens(self, mask_NK: Tensor) -> Tensor:
        """Returns which tokens code a real value, bool `(N, L)`; any other has the code of zeros.

        By default each token codes the whole vector.
        """
        return real_parts(mask_NK, 1).expand(-1, self.num_tokens)

    @abstractmethod
    def decode(self, codes_NL: Tensor) -> Tensor:
        """Returns reconstructions float32 `(N, K)`; leading dimensions may be any."""

    @abstractmethod
    def initialise(
        self, vectors_NK: Tensor, num_iterations: int, generator: torch.Generator, mask_NK: Tensor | None = None
    ) -> None:
        """Fits the state to vectors, for instance by k-means; equal calls give equal states."""

    def collect(self, vectors_NK: Tensor, codes_NL: Tensor, mask_NK: Tensor | None = None) -> None:
        """Adds a step's assignments to the statistics."""

    def update(self, all_reduce: AllReduce) -> None:
        """Moves the state by the collected statistics of all workers, then forgets them."""


def real_parts(mask_NK: Tensor, num_parts: int) -> Tensor:
    """Returns which of equally long parts of vectors hold a real value, bool `(N, num_parts)`."""
    return (mask_NK > 0).unflatten(-1, (num_parts, -1)).any(dim=-1)


def masked_mean(values_NK: Tensor, mask_NK: Tensor | None, num_groups: int = 1) -> Tensor:
    """Returns the mean over real values, 0 where there are none; with groups, the mean over the means of groups."""
    if mask_NK is None:
        return values_NK.mean()
    if num_groups == 1:
        return (values_NK * mask_NK).sum() / mask_NK.sum().clamp(min=1.0)
    sums, counts = (each.reshape(num_groups, -1).sum(dim=1) for each in (values_NK * mask_NK, mask_NK))
    return (sums / counts.clamp(min=1.0)).mean()
