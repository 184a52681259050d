"""Encoders of what a generator is told: instruction text, labelled samples, the place in the layout.

Shape legend: B networks, W words, S samples, F features of a sample, M chunks, G place features, H width.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_WORD = re.compile(r"\w+")


class TextEncoder(nn.Module):
    """Set of hashed words (Joulin et al. 2017, "Bag of tricks for efficient text classification").

    Trained along with the generator, it needs no download and no vocabulary file. Neither the order of words nor
    how often each occurs is seen, nor punctuation: commas alone would outweigh the words that tell tasks apart.
    """

    def __init__(self, width: int, num_buckets: int = 1024) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.words = nn.EmbeddingBag(num_buckets, width, mode="sum")
        nn.init.normal_(self.words.weight, std=1.0)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """`(B, H)` of B texts."""
        bags = [self._buckets(text) for text in texts]
        device = self.words.weight.device
        offsets = torch.tensor([0] + [len(bag) for bag in bags[:-1]], device=device).cumsum(0)
        flat = torch.tensor([bucket for bag in bags for bucket in bag], device=device)
        return self.head(self.words(flat, offsets))

    def _buckets(self, text: str) -> list[int]:
        words = dict.fromkeys(_WORD.findall(text.lower()))
        return [zlib.crc32(word.encode()) % self.num_buckets for word in words] or [0]


def class_members(labels_BS: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot labels `(B, S, C)`; unlike torch's own it looks at no value, so it runs under `vmap`."""
    return (labels_BS.unsqueeze(-1) == torch.arange(num_classes, device=labels_BS.device)).to(dtype)


class SampleEncoder(nn.Module):
    """Deep set over labelled samples (Zaheer et al. 2017): order does not matter, their number may vary.

    Samples are centred and scaled per set. Of each class the mean's direction is seen beside: what all sets have
    in common would drown what tells tasks apart, and training by a task's loss would stay at chance for long.
    """

    def __init__(self, num_features: int, max_classes: int, width: int) -> None:
        super().__init__()
        self.pixel = nn.Linear(num_features, width)
        self.label = nn.Embedding(max_classes, width)
        self.mix = nn.Sequential(nn.GELU(), nn.Linear(width, width))
        self.per_class = nn.Parameter(torch.randn(max_classes, num_features, width) * num_features**-0.5)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(width, width))

    def forward(self, samples_BSF: Tensor, labels_BS: Tensor) -> Tensor:
        """`(B, H)` of B sets of samples."""
        centred_BSF = samples_BSF - samples_BSF.mean(dim=1, keepdim=True)
        centred_BSF = centred_BSF / centred_BSF.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)
        mixed_BH = self.mix(self.pixel(centred_BSF) + self.label(labels_BS)).mean(dim=1)
        num_classes = self.label.num_embeddings
        member_BSC = class_members(labels_BS, num_classes, samples_BSF.dtype)
        share_BC1 = member_BSC.sum(1).clamp(min=1.0).unsqueeze(-1)
        means_BCF = torch.einsum("bsc,bsf->bcf", member_BSC, centred_BSF) / share_BC1
        # Below a hundredth of the samples' spread a mean is rounding, for instance where all have one label.
        direction_BCF = means_BCF / means_BCF.square().mean(dim=2, keepdim=True).sqrt().clamp(min=1e-2)
        return self.head(mixed_BH + torch.einsum("bcf,cfh->bh", direction_BCF, self.per_class))


class PlaceEncoder(nn.Module):
    """Embeds what is known of each chunk's place in the layout."""

    def __init__(self, num_place_features: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(num_place_features, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        )

    def forward(self, places_MG: Tensor) -> Tensor:
        """`(M, H)` of M chunks."""
        return self.net(places_MG)


class ConditionEncoder(nn.Module):
    """Text, samples and layout as a prefix of three tokens."""

    num_tokens = 3

    def __init__(self, *, num_features: int, max_classes: int, num_place_features: int, width: int) -> None:
        super().__init__()
        self.text = TextEncoder(width)
        self.samples = SampleEncoder(num_features, max_classes, width)
        self.layout = PlaceEncoder(num_place_features, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, texts: Sequence[str], samples_BSF: Tensor, labels_BS: Tensor, places_MG: Tensor) -> Tensor:
        """Prefix tokens `(B, 3, H)`: instruction, samples, layout."""
        text_BH = self.text(texts)
        samples_BH = self.samples(samples_BSF, labels_BS)
        layout_BH = self.layout(places_MG.mean(dim=0)).expand_as(text_BH)
        return self.norm(torch.stack([text_BH, samples_BH, layout_BH], dim=1))


class ConditionSummary(nn.Module):
    """Tells every place the whole condition: `place + told + place * told`.

    Both sides are normalised first. Without that the condition drowns in the places' common mean and training
    by a task's loss stays at chance.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.told = nn.Sequential(nn.Linear(ConditionEncoder.num_tokens * width, width), nn.LayerNorm(width))

    def forward(self, prefix_BTH: Tensor, places_MH: Tensor) -> Tensor:
        """`(B, M, H)` of prefix tokens and embedded places."""
        told_B1H = self.told(prefix_BTH.flatten(1)).unsqueeze(1)
        return places_MH + told_B1H + places_MH * told_B1H
