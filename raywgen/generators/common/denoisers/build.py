"""Chooses and builds the denoiser that suits the layouts of a corpus."""

from __future__ import annotations

import torch

from raywgen.generators.common.denoisers.base import Denoiser
from raywgen.generators.common.denoisers.chunks import ChunkWeights
from raywgen.generators.common.denoisers.flat import FlatWeights
from raywgen.generators.common.denoisers.head import HeadWeights, is_head
from raywgen.generators.common.denoisers.latents import LatentWeights
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.tokenizer import Tokenizer
from raywgen.generators.interface import DataSpec
from raywgen.weights import Layout, Normalizer, NormalizerTable

# A perceptron on more values has more parameters than the attention between their chunks costs.
_MOST_FLAT_VALUES = 1 << 14


def build_denoiser(
    config: NetworkConfig, normalizers: NormalizerTable, data: DataSpec, tokenizer: Tokenizer | None = None
) -> Denoiser:
    """Builds the denoiser that suits the layouts.

    Args:
        config: Kind and sizes of the denoiser.
        normalizers: Layouts with their normalisers.
        data: Sizes of samples.
        tokenizer: The tokeniser whose latents are denoised, where the kind is `latents`.

    Raises:
        ValueError: `kind` is `head`, but a layout is no linear layer on the task's samples; `kind` is `flat`, but there
            are several layouts; or `kind` is `latents`, but there is no tokeniser.
    """
    layouts = [layout for layout, _ in normalizers.values()]
    kind = _kind(config, normalizers, data)
    strange = _no_head(layouts, data)
    if kind == "head" and strange is not None:
        shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in strange.generated[:4])
        raise ValueError(
            f"kind=head: the layout ({shapes}) is no linear layer on samples of {data.num_features} values; give "
            "kind=chunks"
        )
    if kind == "latents":
        if tokenizer is None:
            raise ValueError("kind=latents: only mcdi has a tokeniser; give kind=chunks")
        return LatentWeights(config, tokenizer, data)
    if kind == "flat" and len(layouts) > 1:
        raise ValueError(f"kind=flat: the corpus has {len(layouts)} layouts; give kind=chunks")
    if kind == "flat":
        return FlatWeights(config, layouts[0], data)
    if kind == "head":
        return HeadWeights(config, data)
    return ChunkWeights(config, data)


def _kind(config: NetworkConfig, normalizers: NormalizerTable, data: DataSpec) -> str:
    """Returns `config.kind`, or the kind that suits the layouts if it is `auto`."""
    layouts = [layout for layout, _ in normalizers.values()]
    if config.kind != "auto":
        return config.kind
    if _no_head(layouts, data) is None:
        return "head"
    return "flat" if len(layouts) == 1 and layouts[0].num_values <= _MOST_FLAT_VALUES else "chunks"


def _no_head(layouts: list[Layout], data: DataSpec) -> Layout | None:
    return next((layout for layout in layouts if not is_head(layout, data.num_features)), None)


def suited_normalizers(config: NetworkConfig, normalizers: NormalizerTable, data: DataSpec) -> NormalizerTable:
    """Returns normalisers in whose units a head's bias counts for as much as its weights do.

    On features of unit size, errors of F weights add up in a logit, but only one error of a bias. In units of its own
    small spread, the bias would dominate any loss.
    """
    if _kind(config, normalizers, data) != "head":
        return normalizers
    return {name: (layout, _with_bias_scale(layout, known)) for name, (layout, known) in normalizers.items()}


def _with_bias_scale(layout: Layout, known: Normalizer) -> Normalizer:
    num_features = layout.generated[0].shape[1]
    weight_scale = known.scale_N[0]
    scale_N = torch.stack([weight_scale, weight_scale * num_features**0.5])
    return Normalizer(layout, known.base_N, scale_N, known.start_D)
