"""The base of generators that take a support set and write heads with any number of classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from raywgen.generators.common.denoisers import Denoiser, HeadWeights, is_head, suited_normalizers
from raywgen.generators.common.network import MAX_ROWS, NetworkConfig
from raywgen.generators.common.writing import pieces_of_windows
from raywgen.generators.interface import DataSpec, Generated, GenerationRequest, Generator
from raywgen.generators.pieces import GeneratedPiece, Piece
from raywgen.generators.settings import ConfigT_co, Sampling
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


class WindowGenerator(SupportSetGenerator[ConfigT_co]):
    """A generator that writes windows of networks, none of which reads another, so that any of them can be a piece."""

    @abstractmethod
    def write(self, request: GenerationRequest, groups: slice) -> Tensor:
        """Returns the values in generator units, `(B, X)`, that some groups of windows write, as `write_networks`."""

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Generated:
        """Writes one network for each condition of the request; the instruction is not used."""
        normalizer = self.normalizer(request.layout, request.normalizer)
        return Generated(values_BD=normalizer.denormalise(self.write(request, slice(None))), log_prob_B=None)

    def pieces(self, layout: Layout, sampling: Sampling, num: int, max_values: int) -> list[Piece]:
        """Returns runs of groups of windows, which do not read each other."""
        return pieces_of_windows(self.network, layout, num, getattr(sampling, "max_rows", MAX_ROWS), max_values)

    @torch.no_grad()
    def generate_piece(self, request: GenerationRequest, piece: Piece, kept: Mapping[str, Tensor]) -> GeneratedPiece:
        """Writes some groups of windows."""
        normalised_BX = self.write(request, slice(*piece.units))
        position_X = torch.arange(piece.start, piece.stop, device=normalised_BX.device)
        normalizer = self.normalizer(request.layout, request.normalizer)
        return GeneratedPiece(values_BX=normalizer.denormalise(normalised_BX, position_X), log_prob_B=None)
