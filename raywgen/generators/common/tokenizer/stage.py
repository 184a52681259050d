"""The stage that trains the tokeniser (IGPG, section 3, stage 1).

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from raywgen.generators.common.output_loss import check_module, output_loss
from raywgen.generators.common.tokenizer.config import VQVAEConfig
from raywgen.generators.common.tokenizer.tokenizer import Tokenizer
from raywgen.generators.common.tokenizer.windows import random_windows
from raywgen.generators.stage import Stage, StageLoss, StageNeeds
from raywgen.nn.quantisers import AllReduce
from raywgen.nn.quantisers.base import masked_mean
from raywgen.weights import KeyedNoise, Layout, Normalizer, WeightBatch, Windows

# A thousand vectors for each of 256 codes; with more, k-means takes minutes and is no better.
_MOST_INITIAL_VECTORS = 1 << 18
_MOST_KEPT_VECTORS = 1 << 20
# What a step on whole networks holds of each value for the backward pass, beside what coders keep, as measured.
_BYTES_BESIDE_CODERS = 24.0


def masked_reconstruction_loss(chunks_BMK: Tensor, decoded_BMK: Tensor, mask_MK: Tensor) -> Tensor:
    """Returns `||M * (theta - theta_hat)||^2`, mean over real values (IGPG, section 3, first term of L_VQ).

    The mask is the same for all networks, or one for each, `(B, M, K)`. Then each network counts as much as any other,
    however many of its values are real: a loss that is a mean over networks is the same in whatever parts a batch is
    taken.
    """
    return _mean_of_networks((chunks_BMK - decoded_BMK).square(), mask_MK)


def snr_db(chunks_BMK: Tensor, decoded_BMK: Tensor, mask_MK: Tensor) -> Tensor:
    """Returns the signal-to-noise ratio over real values, in decibels."""
    power = _mean_of_networks(chunks_BMK.square(), mask_MK)
    return 10 * torch.log10(power / masked_reconstruction_loss(chunks_BMK, decoded_BMK, mask_MK))


def _mean_of_networks(values_BMK: Tensor, mask_MK: Tensor) -> Tensor:
    if mask_MK.dim() == 2:
        return (values_BMK * mask_MK).sum() / (mask_MK.sum() * len(values_BMK)).clamp(min=1)
    return masked_mean(values_BMK, mask_MK, len(values_BMK))


class _ChunkWindow(NamedTuple):
    """The part of each network that a step sees: all of it, or a window.

    Attributes:
        chunks_BMK: Normalised chunks.
        positions_MG: Position features, the same for all networks or `(B, M, G)`.
        mask_MK: 1 for values, 0 for padding, the same for all networks or `(B, M, K)`.
        values_MK: 1 for values that are weights, 0 for scales and padding, in the shape of `mask_MK`.
    """

    chunks_BMK: Tensor
    positions_MG: Tensor
    mask_MK: Tensor
    values_MK: Tensor


class _VectorSample:
    """Vectors with their masks, thinned out evenly where there are too many to keep.

    Args:
        generator: Draws which ones are kept.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._share = 1.0

    def add(self, vectors_NK: Tensor, masks_NK: Tensor) -> None:
        """Adds vectors, of which those of before and these are kept with the same probability."""
        self._parts.append(self._part((vectors_NK, masks_NK), self._share))
        while sum(len(vectors) for vectors, _ in self._parts) > _MOST_KEPT_VECTORS:
            self._parts = [self._part(part, 0.5) for part in self._parts]
            self._share /= 2

    def all(self, most: int) -> tuple[Tensor, Tensor]:
        """Returns the vectors that were kept, or a random `most` of them."""
        vectors_NK, masks_NK = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        if len(vectors_NK) <= most:
            return vectors_NK, masks_NK
        chosen_N = torch.randperm(len(vectors_NK), generator=self._generator)[:most]
        return vectors_NK[chosen_N], masks_NK[chosen_N]

    def _part(self, part: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
        vectors_NK, masks_NK = part
        if share == 1:
            return vectors_NK, masks_NK
        chosen_N = torch.randperm(len(vectors_NK), generator=self._generator)[: int(len(vectors_NK) * share)]
        return vectors_NK[chosen_N], masks_NK[chosen_N]


class TokenizerStage(Stage):
    """Trains the VQ-VAE on reconstruction and commitment."""

    name = "tokenizer"

    def __init__(self, tokenizer: Tokenizer, normalizers: dict[str, tuple[Layout, Normalizer]]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.normalizers = normalizers

    @property
    def config(self) -> VQVAEConfig:
        """Returns the settings of the tokeniser."""
        return self.tokenizer.config

    @property
    def needs(self) -> StageNeeds:
        """The stage needs tasks only if outputs are compared, and whole networks unless windows suffice."""
        return StageNeeds(tasks=self.config.output_loss_weight > 0, whole_networks=not self._takes_windows)

    @property
    def _takes_windows(self) -> bool:
        """Whether windows suffice: the outputs of a network follow from all of it."""
        return self.config.output_loss_weight == 0 and self.config.window > 0

    @property
    def bytes_per_value(self) -> float:
        """Both coders keep what they compute."""
        coders = self.tokenizer.encoder.bytes_per_chunk + self.tokenizer.decoder.bytes_per_chunk
        return _BYTES_BESIDE_CODERS + coders / self.config.chunk_length

    def windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws whole blocks of chunks of networks longer than `window`."""
        tokenizer = self.tokenizer
        count, block = tokenizer.num_chunks(layout), tokenizer.encoder.context
        if not self._takes_windows or count <= self.config.window:
            return None
        num_blocks = max(1, self.config.window // block)
        first_B = random_windows(noise, -(-count // block), num_blocks)[:, 0] * block
        windows = Windows(chunk_length=self.config.chunk_length, num_chunks=num_blocks * block, first_B=first_B)
        return tokenizer.with_header(layout, windows)

    def see(self, batch: WeightBatch, noise: KeyedNoise) -> WeightBatch:
        """Returns a batch as the trainer would have given it, with the moments of its windows' header."""
        if batch.windows is not None or (windows := self.windows(batch.layout, noise)) is None:
            return batch
        return self.tokenizer.cut(batch, windows, self.normalizers[batch.layout.id][1])

    @torch.no_grad()
    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Fits the quantiser to chunks of the first batches, by k-means where it has codebooks."""
        tokenizer = self.tokenizer
        generator = torch.Generator().manual_seed(seed)
        sample = _VectorSample(generator)
        for batch in batches:
            if self.config.output_loss_weight > 0:
                check_module(batch.module, batch.layout)
            seen = self._seen(batch, KeyedNoise(seed, batch.sample_index_B, 0), by_code=False)
            latents_BMK = tokenizer.latents(seen.chunks_BMK, seen.positions_MG, seen.mask_MK)
            sample.add(latents_BMK.flatten(0, 1), seen.mask_MK.expand_as(latents_BMK).flatten(0, 1))
        vectors_NK, masks_NK = sample.all(_MOST_INITIAL_VECTORS)
        tokenizer.quantiser.initialise(vectors_NK, 10, generator, masks_NK)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the masked reconstruction loss plus the weighted losses of the quantiser and of outputs.

        For moving-average codebooks the quantiser's loss is `||z - sg[z_q]||^2`, mean over real values; their updates
        minimise the third term, `||sg[z] - z_q||^2` (IGPG, section 3, L_VQ). For Gumbel softmax it is the KL to the
        uniform prior. Gradients pass straight through the quantiser.
        """
        tokenizer = self.tokenizer
        chunks_BMK, positions_MG, mask_MK, values_MK = self._seen(batch, noise, by_code=not self.training)
        latents_BMK = tokenizer.latents(chunks_BMK, positions_MG, mask_MK)
        quantised = tokenizer.quantiser(
            latents_BMK.flatten(0, 1),
            mask_MK.expand_as(latents_BMK).flatten(0, 1),
            lambda *shape: noise.gumbel(latents_BMK.shape[1], *shape).flatten(0, 1),
            num_groups=1 if mask_MK.dim() == 2 else len(mask_MK),
        )
        decoded_BMK = tokenizer.decode_latents(quantised.vectors_NK.view_as(latents_BMK), positions_MG, mask_MK)
        reconstruction = masked_reconstruction_loss(chunks_BMK, decoded_BMK, mask_MK)
        loss = reconstruction + self.config.commitment * quantised.loss
        metrics = {
            "reconstruction": reconstruction.detach(),
            "commitment": quantised.loss.detach(),
            "snr_db": snr_db(chunks_BMK, decoded_BMK.detach(), values_MK),
        }
        if self.config.output_loss_weight > 0:
            normalizer = self.normalizers[batch.layout.id][1]
            mismatch = output_loss(tokenizer.values(decoded_BMK, batch.layout, normalizer), batch).mean()
            metrics["output_loss"] = mismatch.detach()
            loss = loss + self.config.output_loss_weight * mismatch
        return StageLoss(loss=loss, metrics=metrics)

    def after_step(self, all_reduce: AllReduce) -> None:
        """Updates the codebooks by the statistics of all workers."""
        self.tokenizer.quantiser.update(all_reduce)

    def _seen(self, batch: WeightBatch, noise: KeyedNoise, *, by_code: bool) -> _ChunkWindow:
        """Returns whole networks, or, if they are longer than `window`, the blocks of a random window of each."""
        tokenizer, layout = self.tokenizer, batch.layout
        batch = self.see(batch, noise)
        num_header, normalizer = tokenizer.num_header_chunks(layout), self.normalizers[layout.id][1]
        if batch.windows is not None:
            index_BW = batch.windows.index_BW
            header = tokenizer.window_header(batch, by_code=by_code)
            chunks_BWK = tokenizer.window_chunks(batch.values_BD, batch.windows, layout, normalizer, header)
            mask_BWK = tokenizer.mask(layout, index_BW)
            values_BWK = mask_BWK * (index_BW >= num_header).unsqueeze(-1)
            return _ChunkWindow(chunks_BWK, tokenizer.positions(layout, index_BW), mask_BWK, values_BWK)
        chunks_BMK = tokenizer.chunks(batch.values_BD, layout, normalizer, by_code=by_code)
        mask_MK = tokenizer.mask(layout)
        values_MK = mask_MK.clone()
        values_MK[:num_header] = 0
        return _ChunkWindow(chunks_BMK, tokenizer.positions(layout), mask_MK, values_MK)
