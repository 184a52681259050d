"""Denoisers behind one interface: of heads class by class, of small networks at once, of any by chunks or latents.

Shape letters beyond the legend in `raywgen.weights`: n noised versions of a network, Z values of a denoised state, X
values of a window, G position features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.tokenizer import Tokenizer
from raywgen.generators.common.tokenizer.windows import random_windows
from raywgen.generators.interface import DataSpec
from raywgen.nn.denoisers import ChunkDenoiser, FlatDenoiser, HeadDenoiser, HeadFrame
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer, NormalizerTable, WeightBatch, Windows
from raywgen.weights.chunks import (
    chunk_features,
    chunk_mask,
    from_chunks,
    num_chunks,
    num_position_features,
    position_features,
    to_chunks,
)

# A perceptron on more values has more parameters than the attention between their chunks costs.
_MOST_FLAT_VALUES = 1 << 14


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


class ChunkWeights(Denoiser):
    """Writes any network as chunks that attend to each other, those of a long network in windows.

    A window consists of whole blocks of chunks. Windows lie inside the network but for what fills up its last block.
    """

    def __init__(self, config: NetworkConfig, data: DataSpec, block: int = 1) -> None:
        super().__init__()
        self._length, self._block = config.chunk_length, block
        self.window = config.window
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

    def predict(
        self,
        x_BnD: Tensor,
        time_Bn: Tensor,
        condition_embedding: Tensor,
        layout: Layout,
        place: Place | None = None,
    ) -> Tensor:
        """Predicts all chunks of networks or windows at once."""
        if place is None:
            positions = position_features(layout, self._length).to(x_BnD.device)
        else:
            positions, x_BnD = place.positions_BWG, x_BnD * place.is_real_BX.unsqueeze(1)
        chunks = self.net(to_chunks(x_BnD, self._length), time_Bn, condition_embedding, positions)
        return from_chunks(chunks, x_BnD.shape[-1])

    @property
    def bytes_per_value(self) -> float:
        """Returns what was measured: 21 numbers for each unit of a block, and 7 around the blocks."""
        net = self.net
        return 4 * (21 * len(net.trunk.blocks) + 7) * net.condition_width / self._length

    def draw_windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws a window of each network that is longer than one."""
        num_blocks, num_seen = self._num_blocks(layout)
        if num_seen == num_blocks:
            return None
        return self._windows(random_windows(noise, num_blocks, num_seen)[:, 0], num_seen)

    def all_windows(self, layout: Layout) -> Windows | None:
        """Returns windows side by side; the last one overlaps the one before, so that all are equally long."""
        num_blocks, num_seen = self._num_blocks(layout)
        if num_seen == num_blocks:
            return None
        return self._windows(torch.arange(0, num_blocks, num_seen).clamp(max=num_blocks - num_seen), num_seen)

    def place(self, layout: Layout, windows: Windows | None) -> Place | None:
        """Returns position features of the windows' chunks, and which of their values exist."""
        if windows is None:
            return None
        is_real_BX = self._is_real(layout, windows).to(torch.float32)
        weight_BX = is_real_BX / is_real_BX.mean(dim=1, keepdim=True)
        return Place(chunk_features(layout, self._length, windows.index_BW), weight_BX)

    def _num_blocks(self, layout: Layout) -> tuple[int, int]:
        """Returns how many blocks of chunks a network has, and how many of them are seen at once."""
        num_blocks = -(-num_chunks(layout, self._length) // self._block)
        return num_blocks, min(num_blocks, max(1, self.window // self._block)) if self.window else num_blocks

    def _windows(self, first_B: Tensor, num_blocks: int) -> Windows:
        """Returns windows of so many blocks each, given their first ones."""
        return Windows(chunk_length=self._length, num_chunks=num_blocks * self._block, first_B=first_B * self._block)

    def _is_real(self, layout: Layout, windows: Windows) -> Tensor:
        """Returns which values `(B, X)` of the windows' states are those of a network."""
        return chunk_mask(layout, self._length, windows.index_BW).flatten(1) > 0


class LatentWeights(ChunkWeights):
    """Writes any network as latents of a trained tokeniser, one for each chunk."""

    def __init__(self, config: NetworkConfig, tokenizer: Tokenizer, data: DataSpec) -> None:
        super().__init__(
            replace(config, chunk_length=tokenizer.config.chunk_length), data, block=tokenizer.encoder.context
        )
        self._frozen = (tokenizer,)

    @torch.no_grad()
    def encode(
        self, normalised_BAD: Tensor, condition: Condition, layout: Layout, windows: Windows | None = None
    ) -> Tensor:
        """Encodes weights by the tokeniser, without quantising."""
        return self.latents(normalised_BAD, layout, windows)

    def decode(self, states_BZ: Tensor, condition: Condition, layout: Layout, windows: Windows | None = None) -> Tensor:
        """Decodes latents by the tokeniser."""
        return self.weights(states_BZ, layout, windows)

    def latents(self, normalised_BAD: Tensor, layout: Layout, windows: Windows | None = None) -> Tensor:
        """Encodes weights to latents; unlike `encode` it takes no condition."""
        (tokenizer,) = self._frozen
        chunks = to_chunks(normalised_BAD, self._length)
        num_states = 1 if windows is None else chunks.shape[1]
        positions, mask = (part.repeat_interleave(num_states, dim=0) for part in self._about(layout, windows, chunks))
        return (
            tokenizer.latents(chunks.flatten(0, 1), positions, mask).flatten(1).unflatten(0, normalised_BAD.shape[:2])
        )

    def weights(self, states_BZ: Tensor, layout: Layout, windows: Windows | None = None) -> Tensor:
        """Decodes latents to weights; unlike `decode` it takes no condition."""
        (tokenizer,) = self._frozen
        chunks = tokenizer.decode_latents(to_chunks(states_BZ, self._length), *self._about(layout, windows, states_BZ))
        return from_chunks(chunks, layout.num_values if windows is None else windows.num_values)

    def _about(self, layout: Layout, windows: Windows | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns position features and mask of all chunks, or of those of windows, as the tokeniser has them."""
        (tokenizer,) = self._frozen
        index_BW = None if windows is None else windows.index_BW
        positions, mask = tokenizer.positions(layout, index_BW), tokenizer.mask(layout, index_BW)
        return positions.to(like.device), mask.to(like.device)

    def _is_real(self, layout: Layout, windows: Windows) -> Tensor:
        """Returns which latents are those of a network; one that fills up the last chunk is."""
        is_real_BW = windows.index_BW < num_chunks(layout, self._length)
        return is_real_BW.repeat_interleave(self._length, dim=1)

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
