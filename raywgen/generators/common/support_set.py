"""The base of generators that take a support set and write heads with any number of classes."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from raywgen.generators.common.denoisers import Denoiser, HeadWeights, is_head, num_head_classes, suited_normalizers
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.interface import DataSpec, Generator
from raywgen.weights import Layout, Normalizer, NormalizerTable


class SupportSetGenerator(Generator):
    """A generator whose network reads support sets; one of heads takes any number of classes.

    Args:
        config: Kind and sizes of its network.
        normalizers: The layouts of the training corpus with their normalisers.
        data: What the samples of a condition look like.
    """

    def __init__(self, config: NetworkConfig, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__(suited_normalizers(config, normalizers, data), data)

    @property
    @abstractmethod
    def network(self) -> Denoiser:
        """Returns the network that writes."""

    @property
    def max_classes(self) -> int | None:
        """Any number for heads."""
        known_layout, _ = next(iter(self.normalizers.values()))
        return None if is_head(known_layout, self.data.num_features) else super().max_classes

    def knows(self, layout: Layout) -> bool:
        """Any head is known to a network of heads, whatever its number of classes."""
        return super().knows(layout) or self._is_other_head(layout)

    def normalizer(self, layout: Layout, given: Normalizer | None = None) -> Normalizer:
        """The layout's normaliser; a head with another number of classes takes that of a known head."""
        if not self._is_other_head(layout):
            return super().normalizer(layout, given)
        _, known = next(iter(self.normalizers.values()))
        return Normalizer(base_D=_of_head(known.base_D, layout), scale_D=_of_head(known.scale_D, layout))

    def _is_other_head(self, layout: Layout) -> bool:
        is_equivariant = isinstance(self.network, HeadWeights)
        return is_equivariant and is_head(layout, self.data.num_features) and layout.id not in self.normalizers


def _of_head(known_D: Tensor, layout: Layout) -> Tensor:
    """Values of a head with other classes, each tensor at the known one's mean."""
    C = num_head_classes(layout)
    num_features = layout.generated[0].shape[1]
    known_C = len(known_D) // (num_features + 1)
    weight, bias = known_D.split([known_C * num_features, known_C])
    return torch.cat([weight.mean().expand(C * num_features), bias.mean().expand(C)])
