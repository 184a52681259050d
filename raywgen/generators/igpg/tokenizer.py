"""The VQ-VAE that turns chunks into tokens (IGPG, section 3, stage 1).

The paper's tokeniser is a Gumbel-softmax VQ-VAE over images folded from chunks. Here encoder and decoder are
residual perceptrons around the identity, told each chunk's place, and the quantiser is residual with moving
average codebooks: it starts as plain residual k-means and can only improve on it. Few values per token matter
more than a large decoder, which memorises.

Shape legend: B networks, M chunks, K values of a chunk, G place features, L levels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from raywgen.generators.igpg.config import TokenizerConfig
from raywgen.generators.interface import Stage, StageLoss
from raywgen.nn.quantisers import AllReduce, ResidualQuantiser
from raywgen.weights import KeyedNoise, Layout, WeightBatch, WeightReference
from raywgen.weights.chunks import chunk_mask, from_chunks, num_place_features, place_features, to_chunks


class Tokenizer(nn.Module):
    """Chunks to codes and back; one for all layouts."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        K = config.chunk_length
        self.encoder = PlacedCorrection(K, config.width)
        self.quantiser = ResidualQuantiser(config.num_levels, config.num_codes, K, config.codebook_decay)
        self.decoder = PlacedCorrection(K, config.width)

    def latents(self, chunks_BMK: Tensor, places_MG: Tensor) -> Tensor:
        """Chunks before quantisation, `(B, M, K)`."""
        return chunks_BMK + self.encoder(chunks_BMK, places_MG)

    def encode(self, chunks_BMK: Tensor, places_MG: Tensor) -> Tensor:
        """Tokens int64 `(B, M, L)` of normalised chunks."""
        latents_BMK = self.latents(chunks_BMK, places_MG)
        return self.quantiser.encode(latents_BMK.flatten(0, 1)).unflatten(0, latents_BMK.shape[:2])

    def decode_latents(self, latents_BMK: Tensor, places_MG: Tensor) -> Tensor:
        """Normalised chunks `(B, M, K)` of latents, be they code vectors or expectations over them."""
        return latents_BMK + self.decoder(latents_BMK, places_MG)

    def decode(self, codes_BML: Tensor, places_MG: Tensor) -> Tensor:
        """Normalised chunks `(B, M, K)` of tokens."""
        return self.decode_latents(self.quantiser.decode(codes_BML), places_MG)

    def chunks(self, values_BD: Tensor, reference: WeightReference) -> Tensor:
        """Flat vectors to normalised chunks `(B, M, K)`."""
        return to_chunks(reference.normalise(values_BD), self.config.chunk_length)

    def values(self, chunks_BMK: Tensor, layout: Layout, reference: WeightReference) -> Tensor:
        """Normalised chunks to flat vectors `(B, D)`."""
        return reference.denormalise(from_chunks(chunks_BMK, layout.num_values))

    def places(self, layout: Layout) -> Tensor:
        """What is known of each chunk's place, `(M, G)`."""
        return place_features(layout, self.config.chunk_length)


def masked_reconstruction_loss(chunks_BMK: Tensor, decoded_BMK: Tensor, mask_MK: Tensor) -> Tensor:
    """`||M * (theta - theta_hat)||^2`, mean over real values (IGPG, section 3, first term of L_VQ)."""
    error = (chunks_BMK - decoded_BMK).square() * mask_MK
    return error.sum() / (mask_MK.sum() * len(chunks_BMK))


def commitment_loss(latents_BMK: Tensor, quantised_BMK: Tensor) -> Tensor:
    """`||z - sg[z_q]||^2`, mean over values (IGPG, section 3, second term of L_VQ).

    The third term, `||sg[z] - z_q||^2`, is what the codebooks' moving averages minimise.
    """
    return (latents_BMK - quantised_BMK.detach()).square().mean()


class TokenizerStage(Stage):
    """Trains the VQ-VAE on reconstruction and commitment."""

    name = "tokenizer"

    def __init__(self, tokenizer: Tokenizer, references: dict[str, tuple[Layout, WeightReference]]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.references = references

    @property
    def config(self) -> TokenizerConfig:
        """Of the tokeniser."""
        return self.tokenizer.config

    @torch.no_grad()
    def begin(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """k-means on chunks of the first batches."""
        tokenizer = self.tokenizer
        vectors = [
            tokenizer.latents(self._chunks(batch), tokenizer.places(batch.layout)).flatten(0, 1) for batch in batches
        ]
        generator = torch.Generator().manual_seed(seed)
        tokenizer.quantiser.initialise(torch.cat(vectors), num_iterations=10, generator=generator)

    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Masked reconstruction plus weighted commitment, straight through the quantiser."""
        tokenizer = self.tokenizer
        places_MG = tokenizer.places(batch.layout)
        mask_MK = chunk_mask(batch.layout, self.config.chunk_length)
        chunks_BMK = self._chunks(batch)
        latents_BMK = tokenizer.latents(chunks_BMK, places_MG)
        flat_NK = latents_BMK.flatten(0, 1)
        codes_NL = tokenizer.quantiser.encode(flat_NK)
        if self.training:
            tokenizer.quantiser.collect(flat_NK, codes_NL)
        quantised_BMK = tokenizer.quantiser.decode(codes_NL).view_as(latents_BMK)
        straight_through = latents_BMK + (quantised_BMK - latents_BMK).detach()
        decoded_BMK = tokenizer.decode_latents(straight_through, places_MG)
        reconstruction = masked_reconstruction_loss(chunks_BMK, decoded_BMK, mask_MK)
        commitment = commitment_loss(latents_BMK, quantised_BMK)
        power = (chunks_BMK.square() * mask_MK).sum() / (mask_MK.sum() * len(chunks_BMK))
        return StageLoss(
            loss=reconstruction + self.config.commitment * commitment,
            metrics={
                "reconstruction": reconstruction.detach(),
                "commitment": commitment.detach(),
                "snr_db": 10 * torch.log10(power / reconstruction.detach()),
            },
        )

    def after_step(self, all_reduce: AllReduce) -> None:
        """Moves the codebooks by the statistics of all workers."""
        self.tokenizer.quantiser.update(all_reduce)

    def _chunks(self, batch: WeightBatch) -> Tensor:
        return self.tokenizer.chunks(batch.values_BD, self.references[batch.layout.id][1])


class PlacedCorrection(nn.Module):
    """What to add to a chunk, told its place; zero until trained."""

    def __init__(self, chunk_length: int, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(chunk_length, width)
        self.place = nn.Linear(num_place_features(), width)
        self.out = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, chunk_length))
        final = self.out[-1]
        assert isinstance(final, nn.Linear)
        nn.init.zeros_(final.weight)
        nn.init.zeros_(final.bias)

    def forward(self, x_BMK: Tensor, places_MG: Tensor) -> Tensor:
        """`(B, M, K)` of chunks and their places."""
        return self.out(self.value(x_BMK) + self.place(places_MG))
