"""The base of generators that take a support set and write heads with any number of classes."""

from __future__ import annotations

from abc import abstractmethod

import torch

from raywgen.generators.common.denoisers import Denoiser, HeadWeights, is_head, suited_normalizers
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.interface import DataSpec, Generator
from raywgen.generators.settings import ConfigT_co
from raywgen.weights import Layout, Normalizer, NormalizerTable


class SupportSetGenerator(Generator[ConfigT_co]):
    """A generator whose network reads support sets; a generator of heads takes any number of classes.

    Args:
        config: The method's settings.
        sizes: Kind and sizes of its network.
        normalizers: The layouts of the training corpus with their normalisers.
        data: The form of the samples of a condition.
    """

    def __init__(self, config: ConfigT_co, sizes: NetworkConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(config, suited_normalizers(sizes, normalizers, data), data)

    @property
    @abstractmethod
    def network(self) -> Denoiser:
        """Returns the network that writes weights."""

    @property
    def max_classes(self) -> int | None:
        """Most classes a task may have; None, for any number, where heads are written."""
        known_layout, _ = next(iter(self.normalizers.values()))
        return None if is_head(known_layout, self.data.num_features) else super().max_classes

    def knows(self, layout: Layout) -> bool:
        """Whether the layout was trained on; a generator of heads knows heads with any number of classes."""
        return super().knows(layout) or self._is_other_head(layout)

    def normalizer(self, layout: Layout, given: Normalizer | None = None) -> Normalizer:
        """Returns the layout's normaliser; a head with another number of classes takes that of a known head."""
        if not self._is_other_head(layout):
            return super().normalizer(layout, given)
        known_layout, known = next(iter(self.normalizers.values()))
        base_N = known.base_N
        if known.start_D is not None:
            sizes = [spec.num_values for spec in known_layout.generated]
            base_N = torch.stack([part.mean() for part in known.start_D.split(sizes)])
        return Normalizer(layout, base_N, known.scale_N)

    def _is_other_head(self, layout: Layout) -> bool:
        is_equivariant = isinstance(self.network, HeadWeights)
        return is_equivariant and is_head(layout, self.data.num_features) and layout.id not in self.normalizers
