"""Denoisers behind one interface: of heads class by class, of small networks at once, of any by chunks or latents."""

from raywgen.generators.common.denoisers.base import Denoiser, Place
from raywgen.generators.common.denoisers.build import build_denoiser, suited_normalizers
from raywgen.generators.common.denoisers.chunks import ChunkWeights
from raywgen.generators.common.denoisers.flat import FlatWeights
from raywgen.generators.common.denoisers.head import HeadWeights, from_rows, is_head, num_head_classes, to_rows
from raywgen.generators.common.denoisers.latents import LatentWeights

__all__ = [
    "ChunkWeights",
    "Denoiser",
    "FlatWeights",
    "HeadWeights",
    "LatentWeights",
    "Place",
    "build_denoiser",
    "from_rows",
    "is_head",
    "num_head_classes",
    "suited_normalizers",
    "to_rows",
]
