"""Denoisers of weights: networks that see noised weights, the step of the chain and what is known of the task.

Both predict for several noised versions of the same weights at once, so that a task is embedded once.

Shape legend: B tasks, n noised versions of each, C classes, R values of a class's row, S samples, F features of a
sample, D values of a network, M chunks, K values of a chunk, G place features, H width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from raywgen.nn.conditions import PlaceEncoder, SampleEncoder, class_members
from raywgen.nn.transformer import Transformer

_NUM_FREQUENCIES = 8


class TimeEncoder(nn.Module):
    """Embeds the fraction of the chain that is done."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * _NUM_FREQUENCIES, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        """`(..., H)` of fractions in [0, 1]."""
        angle = time.unsqueeze(-1) * math.pi * 2.0 ** torch.arange(-1, _NUM_FREQUENCIES - 1, device=time.device)
        return self.net(torch.cat([angle.sin(), angle.cos()], dim=-1))


class HeadDenoiser(nn.Module):
    """Denoises a linear head, one row a class; permuting the classes permutes what it predicts.

    Every class goes through the same network, which sees its own noised row and support mean, and the means of both
    over all classes. So it takes any number of classes.

    Args:
        num_features: F, of an encoded sample.
        num_values: R, of a row.
        width: H.
        num_layers: Residual blocks.
    """

    def __init__(self, num_features: int, num_values: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.row = nn.Linear(2 * num_values, width)
        self.task = nn.Linear(3 * num_features, width)
        self.time = TimeEncoder(width)
        self.blocks = nn.ModuleList(_ClassBlock(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, num_values)
        # Straight from the support means, their squared lengths and their products with the common mean: the head of
        # nearest class means (Snell et al. 2017, section 2.4) is linear in these, so nothing hidden has to learn it.
        self.direct = nn.Linear(num_features + 2, num_values, bias=False)
        self.num_told = width + num_values
        self.register_buffer("centre_F", torch.zeros(num_features))
        self.register_buffer("spread", torch.ones(()))

    centre_F: Tensor
    spread: Tensor

    @torch.no_grad()
    def measure(self, samples_XF: Tensor) -> None:
        """Takes the features' centre and spread from examples."""
        self.centre_F.copy_(samples_XF.mean(dim=0))
        self.spread.copy_((samples_XF - self.centre_F).square().mean().sqrt().clamp(min=1e-6))

    @torch.no_grad()
    def begin_at_nearest_means(self, weight_scale: float, bias_scale: float) -> None:
        """Has it write the head of nearest class means, whatever its state and time; call `measure` before.

        With u a class's mean about the common one c, of features scaled to z = (x - centre) / spread, that head has the
        logits `a (2 u . z - |u|^2 - 2 u . c)`; a gives the weights the size that stored ones have.

        Args:
            weight_scale: Spread of stored weights, which written ones are multiplied with.
            bias_scale: Likewise of biases.
        """
        F = len(self.centre_F)
        a = self.spread * weight_scale / 2
        self.out.weight.zero_()
        self.out.bias.zero_()
        self.direct.weight.copy_(torch.eye(*self.direct.weight.shape))
        self.direct.weight[F] = 0
        self.direct.weight[F, :F] = -2 * a * self.centre_F / (self.spread * bias_scale)
        # The products are means over features, not sums.
        self.direct.weight[F, F:] = -a * F / bias_scale * torch.tensor([1.0, 2.0])

    def tell(self, samples_BSF: Tensor, labels_BS: Tensor, num_classes: int) -> Tensor:
        """What `forward` takes of B support sets, `(B, C, H + R)`: all that no step of the chain changes."""
        known_BCI = self.known(samples_BSF, labels_BS, num_classes)
        return torch.cat([self.task(known_BCI), self.direct(_quadratic(known_BCI))], dim=-1)

    def known(self, samples_BSF: Tensor, labels_BS: Tensor, num_classes: int) -> Tensor:
        """What is known of each class, `(B, C, 3F)`: its support mean, that of all classes, its scatter."""
        scaled_BSF = (samples_BSF - self.centre_F) / self.spread
        member_BSC = class_members(labels_BS, num_classes, samples_BSF.dtype)
        share_BSC = member_BSC / member_BSC.sum(dim=1, keepdim=True).clamp(min=1.0)
        means_BCF = share_BSC.transpose(1, 2) @ scaled_BSF
        squares_BCF = share_BSC.transpose(1, 2) @ scaled_BSF.square()
        scatter_BCF = (squares_BCF - means_BCF.square()).clamp(min=0.0)
        common_BCF = means_BCF.mean(dim=1, keepdim=True).expand_as(means_BCF)
        return torch.cat([means_BCF - common_BCF, common_BCF, scatter_BCF], dim=-1)

    def forward(self, x_BnCR: Tensor, time_Bn: Tensor, told_BCT: Tensor) -> Tensor:
        """`(B, n, C, R)` of noised rows, fractions of the chain, and what `tell` says."""
        common_BnCR = x_BnCR.mean(dim=2, keepdim=True).expand_as(x_BnCR)
        task_BCH, direct_BCR = told_BCT.split([self.task.out_features, self.direct.out_features], dim=-1)
        hidden = self.row(torch.cat([x_BnCR, common_BnCR], dim=-1))
        hidden = hidden + task_BCH.unsqueeze(1) + self.time(time_Bn).unsqueeze(2)
        for block in self.blocks:
            hidden = block(hidden)
        return self.out(self.norm(hidden)) + direct_BCR.unsqueeze(1)


def _quadratic(told_BCI: Tensor) -> Tensor:
    """Support means about the common one with two products, `(B, C, F + 2)`, all of about the means' size."""
    own_BCF, common_BCF, _ = told_BCI.chunk(3, dim=-1)
    products = [(own_BCF * other).mean(dim=-1, keepdim=True) for other in (own_BCF, common_BCF)]
    # What all classes have in common changes no decision, and would make biases large.
    return torch.cat([own_BCF, *(part - part.mean(dim=1, keepdim=True) for part in products)], dim=-1)


class _ClassBlock(nn.Module):
    """A residual block on each class that also sees the mean of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own = nn.Linear(width, width)
        self.common = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x_BnCH: Tensor) -> Tensor:
        normed = self.norm(x_BnCH)
        mixed = self.own(normed) + self.common(normed.mean(dim=2, keepdim=True))
        return x_BnCH + self.out(nn.functional.gelu(mixed))


class FlatDenoiser(nn.Module):
    """Denoises all values of one small network at once, by a residual perceptron.

    Args:
        num_values: D, of the network.
        num_features: F.
        max_classes: Most classes a task may have.
        width: H.
        num_layers: Residual blocks, on the task as on the values.
    """

    def __init__(self, num_values: int, num_features: int, max_classes: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.num_told = width
        self.samples = SampleEncoder(num_features, max_classes, width)
        self.told = nn.Sequential(*(_Block(width) for _ in range(num_layers)), nn.LayerNorm(width))
        self.time = TimeEncoder(width)
        self.values = nn.Linear(num_values, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(num_layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_values))

    def tell(self, samples_BSF: Tensor, labels_BS: Tensor) -> Tensor:
        """`(B, H)` of B sets of labelled samples."""
        return self.told(self.samples(samples_BSF, labels_BS))

    def forward(self, x_BnD: Tensor, time_Bn: Tensor, told_BH: Tensor) -> Tensor:
        """`(B, n, D)` of noised values, fractions of the chain, and what `tell` says."""
        hidden = self.values(x_BnD) + self.time(time_Bn) + told_BH.unsqueeze(1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.out(hidden)


class _Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class ChunkDenoiser(nn.Module):
    """Denoises a whole network, cut into chunks that attend to each other.

    Args:
        chunk_length: K.
        num_place_features: G.
        num_features: F.
        max_classes: Most classes a task may have.
        width: H, a multiple of twice `num_heads`.
        num_layers: Attention blocks.
        num_heads: Attention heads.
    """

    def __init__(
        self,
        *,
        chunk_length: int,
        num_place_features: int,
        num_features: int,
        max_classes: int,
        width: int,
        num_layers: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.num_told = width
        self.samples = SampleEncoder(num_features, max_classes, width)
        self.told = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.place = PlaceEncoder(num_place_features, width)
        self.time = TimeEncoder(width)
        self.chunk = nn.Linear(chunk_length, width)
        self.trunk = Transformer(width, num_layers, num_heads, is_causal=False)
        self.out = nn.Linear(width, chunk_length)

    def tell(self, samples_BSF: Tensor, labels_BS: Tensor) -> Tensor:
        """`(B, H)` of B sets of labelled samples."""
        return self.told(self.samples(samples_BSF, labels_BS))

    def forward(self, x_BnMK: Tensor, time_Bn: Tensor, told_BH: Tensor, places_MG: Tensor) -> Tensor:
        """`(B, n, M, K)` of noised chunks, fractions of the chain, what `tell` says, and the layout's places."""
        B, n = time_Bn.shape
        places_MH = self.place(places_MG)
        told_B1H = told_BH.unsqueeze(1)
        placed_BMH = places_MH + told_B1H + places_MH * told_B1H
        hidden = self.chunk(x_BnMK) + placed_BMH.unsqueeze(1) + self.time(time_Bn).unsqueeze(2)
        return self.out(self.trunk(hidden.flatten(0, 1))).unflatten(0, (B, n))
