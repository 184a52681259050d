"""The interface of denoisers.

Shape letters beyond the legend in `raywgen.weights`: n noised versions of a network, Z values of a denoised state, X
values of a window, G position features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from raywgen.weights import Condition, KeyedNoise, Layout, WeightBatch, Windows


class Place(NamedTuple):
    """The place of the window of each of B networks; tensors alone, so that it passes through `vmap`.

    Attributes:
        positions_BWG: Position features of the window's chunks.
        weight_BX: Weight of each value in a mean over the window: equal for all, 0 beyond the end of the network, 1 on
            average.
    """

    positions_BWG: Tensor
    weight_BX: Tensor

    @property
    def is_real_BX(self) -> Tensor:
        """Whether each value lies within the network."""
        return self.weight_BX > 0


class Denoiser(nn.Module, ABC):
    """Predicts weights or noise of normalised flat vectors, conditioned on a task's support set.

    Attributes:
        window: Most chunks that are seen at once, where longer networks are taken in windows; 0 where no network is.
    """

    window = 0

    @abstractmethod
    def embed_condition(self, samples_BSF: Tensor, labels_BS: Tensor, layout: Layout) -> Tensor:
        """Embeds B support sets, once for all steps of the chain."""

    @abstractmethod
    def predict(
        self,
        x_BnD: Tensor,
        time_Bn: Tensor,
        condition_embedding: Tensor,
        layout: Layout,
        place: Place | None = None,
    ) -> Tensor:
        """Returns predictions of the shape of `x_BnD`.

        Args:
            x_BnD: Noised states of whole networks, or with `place` those of windows `(B, n, X)`; of no effect, and
                predicted at random, beyond the end of a network.
            time_Bn: Fractions of the chain that are done, in [0, 1].
            condition_embedding: The result of `embed_condition`.
            layout: Layout of the networks.
            place: Where the windows lie.
        """

    def draw_windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws a window of each network; None where a network is seen as a whole."""
        return None

    def all_windows(self, layout: Layout) -> Windows | None:
        """Returns windows of one network that together cover it, in order; None where it is seen as a whole."""
        return None

    def place(self, layout: Layout, windows: Windows | None) -> Place | None:
        """Returns what `predict` needs to know of windows; None for None."""
        assert windows is None, "this denoiser sees whole networks"
        return None

    @abstractmethod
    def condition_width(self) -> int:
        """Returns the last dimension of the result of `embed_condition`."""

    def setup(self, batches: Iterable[WeightBatch], *, predicts_weights: bool) -> None:
        """Initialises statistics of support sets from some batches, before training.

        Args:
            batches: Some batches.
            predicts_weights: Whether the predictions are weights, so that they may be initialised at known good ones.
        """

    def encode(
        self, normalised_BAD: Tensor, condition: Condition, layout: Layout, windows: Windows | None = None
    ) -> Tensor:
        """Maps weights in generator units, or windows of them, to the denoised states `(B, A, Z)`.

        By default these are the weights.
        """
        return normalised_BAD

    def decode(self, states_BZ: Tensor, condition: Condition, layout: Layout, windows: Windows | None = None) -> Tensor:
        """Maps states at the end of the chain to weights in generator units, `(B, D)`, differentiably."""
        return states_BZ

    def num_states(self, layout: Layout) -> int:
        """Returns Z, the number of values of a state."""
        return layout.num_values

    @property
    def bytes_per_value(self) -> float:
        """Returns about how many bytes an evaluation keeps for the backward pass, for each value of a network."""
        return 0.0

    def forward(
        self,
        x_BnD: Tensor,
        time_Bn: Tensor,
        samples_BSF: Tensor,
        labels_BS: Tensor,
        layout: Layout,
        place: Place | None = None,
    ) -> Tensor:
        """Calls `predict` after `embed_condition`."""
        return self.predict(x_BnD, time_Bn, self.embed_condition(samples_BSF, labels_BS, layout), layout, place)
