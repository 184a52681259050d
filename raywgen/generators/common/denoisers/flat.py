"""A denoiser of small networks, all values at once.

Shape letters beyond the legend in `raywgen.weights`: n noised versions of a network.
"""

from __future__ import annotations

from torch import Tensor

from raywgen.generators.common.denoisers.base import Denoiser, Place
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.interface import DataSpec
from raywgen.nn.denoisers import FlatDenoiser
from raywgen.weights import Layout


class FlatWeights(Denoiser):
    """Writes all values of one small network at once."""

    def __init__(self, config: NetworkConfig, layout: Layout, data: DataSpec) -> None:
        super().__init__()
        self._layout_id = layout.id
        self.net = FlatDenoiser(layout.num_values, data.num_features, data.max_classes, config.width, config.num_layers)

    def embed_condition(self, samples_BSF: Tensor, labels_BS: Tensor, layout: Layout) -> Tensor:
        """Embeds B support sets, `(B, H)`."""
        return self.net.embed_condition(samples_BSF, labels_BS)

    def condition_width(self) -> int:
        """Returns H, the width of the embedded condition."""
        return self.net.condition_width

    def predict(
        self,
        x_BnD: Tensor,
        time_Bn: Tensor,
        condition_embedding: Tensor,
        layout: Layout,
        place: Place | None = None,
    ) -> Tensor:
        """Predicts all values at once."""
        assert layout.id == self._layout_id, "a flat denoiser knows one layout"
        return self.net(x_BnD, time_Bn, condition_embedding)
