"""A denoiser of linear heads, class by class.

Shape letters beyond the legend in `raywgen.weights`: n noised versions of a network, Z values of a denoised state.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from raywgen.generators.common.denoisers.base import Denoiser, Place
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.interface import DataSpec
from raywgen.nn.denoisers import HeadDenoiser, HeadFrame
from raywgen.weights import Condition, Layout, WeightBatch, Windows


class HeadWeights(Denoiser):
    """Writes a linear layer `(C, E)` with bias `(C,)`; equivariant to the order of classes, for any C.

    It is also equivariant to a shift and a scaling of all features, because states are heads on features that are
    normalised by their support set.
    """

    def __init__(self, config: NetworkConfig, data: DataSpec) -> None:
        super().__init__()
        self.net = HeadDenoiser(data.num_features, config.width, config.num_layers)

    def setup(self, batches: Iterable[WeightBatch], *, predicts_weights: bool) -> None:
        """Measures the mean spread of features, and initialises predicted weights at nearest class means."""
        self.net.measure(torch.cat([self._frame(batch.condition, batch.layout).spread_B for batch in batches]))
        if predicts_weights:
            self.net.begin_at_nearest_means()

    def encode(
        self, normalised_BAD: Tensor, condition: Condition, layout: Layout, windows: Windows | None = None
    ) -> Tensor:
        """Expresses head weights in support-normalised features."""
        rows = to_rows(normalised_BAD, layout)
        return from_rows(self.net.into_frame(rows, self._frame(condition, layout)), layout)

    def decode(self, states_BZ: Tensor, condition: Condition, layout: Layout, windows: Windows | None = None) -> Tensor:
        """Takes head weights back to the given features."""
        rows = to_rows(states_BZ.unsqueeze(1), layout)
        return from_rows(self.net.out_of_frame(rows, self._frame(condition, layout)), layout).squeeze(1)

    def embed_condition(self, samples_BSF: Tensor, labels_BS: Tensor, layout: Layout) -> Tensor:
        """Embeds each class of each support set, `(B, C, H + E + 1)`."""
        return self.net.embed_condition(samples_BSF, labels_BS, num_head_classes(layout))

    def _frame(self, condition: Condition, layout: Layout) -> HeadFrame:
        return self.net.frame(condition.samples_BSF, condition.labels_BS, num_head_classes(layout))

    def condition_width(self) -> int:
        """Returns H + E + 1, the width of an embedded class."""
        return self.net.condition_width

    def predict(
        self,
        x_BnD: Tensor,
        time_Bn: Tensor,
        condition_embedding: Tensor,
        layout: Layout,
        place: Place | None = None,
    ) -> Tensor:
        """Predicts the end of the chain class by class."""
        return from_rows(self.net(to_rows(x_BnD, layout), time_Bn, condition_embedding), layout)


def is_head(layout: Layout, num_features: int) -> bool:
    """Whether a layout is a weight `(C, num_features)` with a bias `(C,)`."""
    shapes = [spec.shape for spec in layout.generated]
    return len(shapes) == 2 and len(shapes[0]) == 2 and shapes[0][1] == num_features and shapes[1] == shapes[0][:1]


def num_head_classes(layout: Layout) -> int:
    """Returns C, the number of classes of a head."""
    return layout.generated[0].shape[0]


def to_rows(values: Tensor, layout: Layout) -> Tensor:
    """Reshapes flat vectors `(..., D)` of a head to one row a class, `(..., C, E + 1)`: weights, then the bias."""
    C = num_head_classes(layout)
    weight, bias = values.split([values.shape[-1] - C, C], dim=-1)
    return torch.cat([weight.unflatten(-1, (C, -1)), bias.unsqueeze(-1)], dim=-1)


def from_rows(rows: Tensor, layout: Layout) -> Tensor:
    """Applies the inverse of `to_rows`."""
    return torch.cat([rows[..., :-1].flatten(-2), rows[..., -1]], dim=-1)
