"""Denoisers behind one interface: of heads class by class, of small networks at once, of any by chunks or latents.

Shape letters beyond the legend in `raywgen.weights`: n noised versions of a network, Z values of a denoised state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.tokenizer import Tokenizer
from raywgen.generators.interface import DataSpec
from raywgen.nn.denoisers import ChunkDenoiser, FlatDenoiser, HeadDenoiser, HeadFrame
from raywgen.weights import Condition, Layout, Normalizer, NormalizerTable, WeightBatch
from raywgen.weights.chunks import from_chunks, num_chunks, num_position_features, position_features, to_chunks

# A perceptron on more values has more parameters than the attention between their chunks costs.
_MOST_FLAT_VALUES = 1 << 14


class Denoiser(nn.Module, ABC):
    """Predicts weights or noise of normalised flat vectors, conditioned on a task's support set."""

    @abstractmethod
    def embed_condition(self, samples_BSF: Tensor, labels_BS: Tensor, layout: Layout) -> Tensor:
        """Embeds B support sets, once for all steps of the chain."""

    @abstractmethod
    def predict(self, x_BnD: Tensor, time_Bn: Tensor, condition_embedding: Tensor, layout: Layout) -> Tensor:
        """Returns predictions `(B, n, D)`, given fractions of the chain in [0, 1] and embedded conditions."""

    @abstractmethod
    def condition_width(self) -> int:
        """Returns the last dimension of the result of `embed_condition`."""

    def setup(self, batches: Iterable[WeightBatch], *, predicts_weights: bool) -> None:
        """Initialises statistics of support sets from some batches, before training.

        Args:
            batches: Some batches.
            predicts_weights: Whether the predictions are weights, so that they may be initialised at known good ones.
        """

    def encode(self, normalised_BAD: Tensor, condition: Condition, layout: Layout) -> Tensor:
        """Maps weights in generator units to the denoised states `(B, A, Z)`; by default these are the weights."""
        return normalised_BAD

    def decode(self, states_BZ: Tensor, condition: Condition, layout: Layout) -> Tensor:
        """Maps states at the end of the chain to weights in generator units, `(B, D)`, differentiably."""
        return states_BZ

    def num_states(self, layout: Layout) -> int:
        """Returns Z, the number of values of a state."""
        return layout.num_values

    def forward(self, x_BnD: Tensor, time_Bn: Tensor, samples_BSF: Tensor, labels_BS: Tensor, layout: Layout) -> Tensor:
        """Calls `predict` after `embed_condition`."""
        return self.predict(x_BnD, time_Bn, self.embed_condition(samples_BSF, labels_BS, layout), layout)


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

    def encode(self, normalised_BAD: Tensor, condition: Condition, layout: Layout) -> Tensor:
        """Expresses head weights in support-normalised features."""
        rows = to_rows(normalised_BAD, layout)
        return from_rows(self.net.into_frame(rows, self._frame(condition, layout)), layout)

    def decode(self, states_BZ: Tensor, condition: Condition, layout: Layout) -> Tensor:
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

    def predict(self, x_BnD: Tensor, time_Bn: Tensor, condition_embedding: Tensor, layout: Layout) -> Tensor:
        """Predicts the end of the chain class by class."""
        return from_rows(self.net(to_rows(x_BnD, layout), time_Bn, condition_embedding), layout)


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

    def predict(self, x_BnD: Tensor, time_Bn: Tensor, condition_embedding: Tensor, layout: Layout) -> Tensor:
        """Predicts all values at once."""
        assert layout.id == self._layout_id, "a flat denoiser knows one layout"
        return self.net(x_BnD, time_Bn, condition_embedding)


class ChunkWeights(Denoiser):
    """Writes any network as chunks that attend to each other."""

    def __init__(self, config: NetworkConfig, data: DataSpec) -> None:
        super().__init__()
        self._length = config.chunk_length
        self.net = ChunkDenoiser(
            chunk_length=config.chunk_length,
            num_position_features=num_position_features(),
            num_features=data.num_features,
            max_classes=data.max_classes,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
        )

    def embed_condition(self, samples_BSF: Tensor, labels_BS: Tensor, layout: Layout) -> Tensor:
        """Embeds B support sets, `(B, H)`."""
        return self.net.embed_condition(samples_BSF, labels_BS)

    def condition_width(self) -> int:
        """Returns H, the width of the embedded condition."""
        return self.net.condition_width

    def predict(self, x_BnD: Tensor, time_Bn: Tensor, condition_embedding: Tensor, layout: Layout) -> Tensor:
        """Predicts all chunks at once."""
        positions_MG = position_features(layout, self._length).to(x_BnD.device)
        chunks = self.net(to_chunks(x_BnD, self._length), time_Bn, condition_embedding, positions_MG)
        return from_chunks(chunks, x_BnD.shape[-1])


class LatentWeights(ChunkWeights):
    """Writes any network as latents of a trained tokeniser, one for each chunk."""

    def __init__(self, config: NetworkConfig, tokenizer: Tokenizer, data: DataSpec) -> None:
        super().__init__(replace(config, chunk_length=tokenizer.config.chunk_length), data)
        self._frozen = (tokenizer,)

    @torch.no_grad()
    def encode(self, normalised_BAD: Tensor, condition: Condition, layout: Layout) -> Tensor:
        """Encodes weights by the tokeniser, without quantising."""
        return self.latents(normalised_BAD, layout)

    def decode(self, states_BZ: Tensor, condition: Condition, layout: Layout) -> Tensor:
        """Decodes latents by the tokeniser."""
        return self.weights(states_BZ, layout)

    def latents(self, normalised_BAD: Tensor, layout: Layout) -> Tensor:
        """Encodes weights to latents; unlike `encode` it takes no condition."""
        (tokenizer,) = self._frozen
        chunks = to_chunks(normalised_BAD, self._length)
        positions_MG, mask_MK = (
            part.to(chunks.device) for part in (tokenizer.positions(layout), tokenizer.mask(layout))
        )
        return (
            tokenizer.latents(chunks.flatten(0, 1), positions_MG, mask_MK)
            .flatten(1)
            .unflatten(0, normalised_BAD.shape[:2])
        )

    def weights(self, states_BZ: Tensor, layout: Layout) -> Tensor:
        """Decodes latents to weights; unlike `decode` it takes no condition."""
        (tokenizer,) = self._frozen
        positions_MG, mask_MK = (
            part.to(states_BZ.device) for part in (tokenizer.positions(layout), tokenizer.mask(layout))
        )
        chunks = tokenizer.decode_latents(to_chunks(states_BZ, self._length), positions_MG, mask_MK)
        return from_chunks(chunks, layout.num_values)

    def num_states(self, layout: Layout) -> int:
        """Returns the number of values of all chunks, including the padding of the last one."""
        return num_chunks(layout, self._length) * self._length


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


def is_head(layout: Layout, num_features: int) -> bool:
    """Whether a layout is a weight `(C, num_features)` with a bias `(C,)`."""
    shapes = [spec.shape for spec in layout.generated]
    return len(shapes) == 2 and len(shapes[0]) == 2 and shapes[0][1] == num_features and shapes[1] == shapes[0][:1]


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
