"""Encoders of a generator's condition: instruction text, labelled samples, and the layout's position features.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raywgen.nn.text_encoders import build_text_encoder


def class_members(labels_BS: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot labels `(B, S, C)`; unlike torch's own it looks at no value, so it runs under `vmap`."""
    return (labels_BS.unsqueeze(-1) == torch.arange(num_classes, device=labels_BS.device)).to(dtype)


class SampleEncoder(nn.Module):
    """Deep set over labelled samples (Zaheer et al. 2017): order does not matter, their number may vary.

    Samples are centred and scaled per set, and the direction of each class mean is an input of its own. Otherwise what
    all sets have in common would hide the differences between tasks, and training by a task's loss would stay at chance
    for long. Where there is one class alone, sets differ by their means, so they are scaled only.

    Args:
        num_features: F; of longer samples the first F values are read.
        max_classes: Most classes of the samples.
        width: H.
    """

    def __init__(self, num_features: int, max_classes: int, width: int) -> None:
        super().__init__()
        self.pixel = nn.Linear(num_features, width)
        self.label = nn.Embedding(max_classes, width)
        self.mix = nn.Sequential(nn.GELU(), nn.Linear(width, width))
        self.per_class = nn.Parameter(torch.randn(max_classes, num_features, width) * num_features**-0.5)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(width, width))

    def forward(self, samples_BSF: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns the embeddings `(B, H)` of B sets of samples."""
        samples_BSF = samples_BSF[..., : self.pixel.in_features]
        num_classes = self.label.num_embeddings
        centred_BSF = samples_BSF if num_classes == 1 else samples_BSF - samples_BSF.mean(dim=1, keepdim=True)
        centred_BSF = centred_BSF / centred_BSF.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)
        mixed_BH = self.mix(self.pixel(centred_BSF) + self.label(labels_BS)).mean(dim=1)
        member_BSC = class_members(labels_BS, num_classes, samples_BSF.dtype)
        share_BC1 = member_BSC.sum(1).clamp(min=1.0).unsqueeze(-1)
        means_BCF = torch.einsum("bsc,bsf->bcf", member_BSC, centred_BSF) / share_BC1
        # A mean below a hundredth of the samples' spread is rounding, for instance if all samples have one label.
        direction_BCF = means_BCF / means_BCF.square().mean(dim=2, keepdim=True).sqrt().clamp(min=1e-2)
        return self.head(mixed_BH + torch.einsum("bcf,cfh->bh", direction_BCF, self.per_class))


class PositionEncoder(nn.Module):
    """Embeds the position features of each chunk."""

    def __init__(self, num_position_features: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(num_position_features, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        )

    def forward(self, positions_MG: Tensor) -> Tensor:
        """Returns the embeddings `(M, H)` of M chunks."""
        return self.net(positions_MG)


class ConditionEncoder(nn.Module):
    """Encodes text, samples and layout as a prefix of three tokens.

    Args:
        num_features: F.
        max_classes: Most classes of the samples.
        num_position_features: G.
        width: H.
        text_encoder: Name of the text encoder, as `build_text_encoder` takes it.
        can_drop: Whether instruction and samples may be left out; a learned token then replaces each.
    """

    num_tokens = 3

    def __init__(
        self,
        *,
        num_features: int,
        max_classes: int,
        num_position_features: int,
        width: int,
        text_encoder: str = "words",
        can_drop: bool = False,
    ) -> None:
        super().__init__()
        self.text = build_text_encoder(text_encoder, width)
        self.samples = SampleEncoder(num_features, max_classes, width)
        self.layout = PositionEncoder(num_position_features, width)
        self.norm = nn.LayerNorm(width)
        # Created only if used, because ZeRO hangs on parameters without gradients.
        self.dropped = nn.Parameter(torch.zeros(2, width)) if can_drop else None

    def forward(
        self,
        texts: Sequence[str],
        samples_BSF: Tensor,
        labels_BS: Tensor,
        mean_position_G: Tensor,
        is_dropped_B2: Tensor | None = None,
    ) -> Tensor:
        """Returns the prefix tokens `(B, 3, H)`: instruction, samples, layout.

        Args:
            texts: B instructions.
            samples_BSF: Samples.
            labels_BS: Their labels.
            mean_position_G: Mean of the position features of the layout's chunks.
            is_dropped_B2: For which networks the instruction, and the samples, are left out, bool; none by default.
        """
        text_BH = self.text(texts)
        parts_B2H = torch.stack([text_BH, self.samples(samples_BSF, labels_BS)], dim=1)
        assert self.dropped is not None or is_dropped_B2 is None, "this encoder was built to drop nothing"
        if self.dropped is not None:
            if is_dropped_B2 is None:
                is_dropped_B2 = torch.zeros(parts_B2H.shape[:2], dtype=torch.bool, device=parts_B2H.device)
            parts_B2H = torch.where(is_dropped_B2.unsqueeze(-1), self.dropped, parts_B2H)
        layout_BH = self.layout(mean_position_G).expand_as(text_BH)
        return self.norm(torch.cat([parts_B2H, layout_BH.unsqueeze(1)], dim=1))


class ConditionSummary(nn.Module):
    """Adds the whole condition to every position: `position + condition + position * condition`.

    Both sides are normalised first. Otherwise the common mean of the positions hides the condition, and training by a
    task's loss stays at chance.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(ConditionEncoder.num_tokens * width, width), nn.LayerNorm(width))

    def forward(self, prefix_BTH: Tensor, positions_MH: Tensor) -> Tensor:
        """Returns `(B, M, H)` from prefix tokens and embedded positions, the same for all networks or `(B, M, H)`."""
        condition_B1H = self.project(prefix_BTH.flatten(1)).unsqueeze(1)
        return positions_MH + condition_B1H + positions_MH * condition_B1H
