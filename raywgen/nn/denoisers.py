"""Denoisers of weights: networks that read noised weights, the step of the chain and the task's support set.

They predict for several noised versions of the same weights at once, so that a task is embedded once.

Shape letters beyond the legend in `raywgen.weights`: n noised versions of a network, R values of a class's row, M
chunks of a network, G position features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raywgen.nn.blocks import Blocks
from raywgen.nn.conditions import PositionEncoder, SampleEncoder, class_members
from raywgen.nn.transformer import Transformer

_NUM_FREQUENCIES = 8


class TimeEncoder(nn.Module):
    """Embeds the fraction of the chain that is done."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * _NUM_FREQUENCIES, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        """Returns the embeddings `(..., H)` of fractions in [0, 1]."""
        angle = time.unsqueeze(-1) * math.pi * 2.0 ** torch.arange(-1, _NUM_FREQUENCIES - 1, device=time.device)
        return self.net(torch.cat([angle.sin(), angle.cos()], dim=-1))


class HeadFrame(NamedTuple):
    """The centre and spread of a support set's features: `z = (x - centre) / spread`.

    Attributes:
        centre_BF: Mean of the class means, over classes that have samples.
        spread_B: Root mean square of all features about the centre.
    """

    centre_BF: Tensor
    spread_B: Tensor


class HeadDenoiser(nn.Module):
    """Denoises a linear head, one row a class; permuting the classes permutes what it predicts.

    Every class goes through the same network, which reads the class's noised row and support mean, and the mean of both
    over all classes. So it takes any number of classes. Features are centred and scaled by their support set, and rows
    belong to a head on such features, so a shift or scaling of other data's features does not matter.

    Args:
        num_features: F, features of an encoded sample.
        width: H.
        num_layers: Residual blocks.
    """

    def __init__(self, num_features: int, width: int, num_layers: int) -> None:
        super().__init__()
        num_values = num_features + 1
        self.row = nn.Linear(2 * num_values, width)
        self.task = nn.Linear(2 * num_features, width)
        self.time = TimeEncoder(width)
        self.blocks = Blocks(_ClassBlock(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, num_values)
        # A linear path from the support means and their squared lengths: the head of nearest class means (Snell et al.
        # 2017, section 2.4) is linear in these, so the hidden layers need not learn it.
        self.direct = nn.Linear(num_features + 1, num_values, bias=False)
        self.condition_width = width + num_values
        self.register_buffer("spread", torch.ones(()))

    spread: Tensor

    @torch.no_grad()
    def measure(self, spread_X: Tensor) -> None:
        """Sets the usual spread of a support set from examples, so that rows keep their size."""
        self.spread.copy_(spread_X.mean())

    @torch.no_grad()
    def begin_at_nearest_means(self) -> None:
        """Initialises the output at the head of nearest class means, for any state and time; call `measure` before.

        With u a class's mean in the frame, that head has the logits `a (2 u . z - |u|^2)`; `2 a = spread` gives rows
        the size u, in units where a bias counts for sqrt(F) weights.
        """
        F = self.direct.in_features - 1
        self.out.weight.zero_()
        self.out.bias.zero_()
        self.direct.weight.copy_(torch.eye(F + 1))
        # The squared length is a mean over features, not a sum.
        self.direct.weight[F, F] = -self.spread * F**0.5 / 2

    def frame(self, samples_BSF: Tensor, labels_BS: Tensor, num_classes: int) -> HeadFrame:
        """Returns the centre and spread of B support sets."""
        member_BSC = class_members(labels_BS, num_classes, samples_BSF.dtype)
        num_present_B1 = member_BSC.amax(dim=1).sum(dim=1, keepdim=True)
        centre_BF = _class_means(samples_BSF, labels_BS, num_classes).sum(dim=1) / num_present_B1
        offset_BSF = samples_BSF - centre_BF.unsqueeze(1)
        return HeadFrame(centre_BF, offset_BSF.square().mean(dim=(1, 2)).sqrt().clamp(min=1e-6))

    def into_frame(self, rows_BACR: Tensor, frame: HeadFrame) -> Tensor:
        """Maps the rows of a head on features to those of the same head on normalised features.

        `w . x + b = (w s) . z + (b + w . c)`, with weights in units of the usual spread.

        Args:
            rows_BACR: Weights, and the bias in units where it counts as much as sqrt(F) weights.
            frame: Centre c and spread s.
        """
        weight, bias = rows_BACR[..., :-1], rows_BACR[..., -1]
        moved = bias + _products(weight, frame.centre_BF)
        scale_B111 = (frame.spread_B / self.spread)[:, None, None, None]
        return torch.cat([weight * scale_B111, moved.unsqueeze(-1)], dim=-1)

    def out_of_frame(self, rows_BACR: Tensor, frame: HeadFrame) -> Tensor:
        """Applies the inverse of `into_frame`."""
        weight = rows_BACR[..., :-1] * (self.spread / frame.spread_B)[:, None, None, None]
        bias = rows_BACR[..., -1] - _products(weight, frame.centre_BF)
        return torch.cat([weight, bias.unsqueeze(-1)], dim=-1)

    def embed_condition(self, samples_BSF: Tensor, labels_BS: Tensor, num_classes: int) -> Tensor:
        """Embeds B support sets for `forward`, `(B, C, H + R)`; the result serves all steps of the chain."""
        known_BCI = self.known(samples_BSF, labels_BS, num_classes)
        return torch.cat([self.task(known_BCI), self.direct(_with_square(known_BCI))], dim=-1)

    def known(self, samples_BSF: Tensor, labels_BS: Tensor, num_classes: int) -> Tensor:
        """Summarises each class, `(B, C, 2F)`, by its support mean and variance, both of normalised features."""
        centre_BF, spread_B = self.frame(samples_BSF, labels_BS, num_classes)
        scaled_BSF = (samples_BSF - centre_BF.unsqueeze(1)) / spread_B[:, None, None]
        means_BCF = _class_means(scaled_BSF, labels_BS, num_classes)
        squares_BCF = _class_means(scaled_BSF.square(), labels_BS, num_classes)
        return torch.cat([means_BCF, (squares_BCF - means_BCF.square()).clamp(min=0.0)], dim=-1)

    def forward(self, x_BnCR: Tensor, time_Bn: Tensor, condition_BCT: Tensor) -> Tensor:
        """Returns predicted rows `(B, n, C, R)`, given noised rows, fractions of the chain and embedded conditions."""
        common_BnCR = x_BnCR.mean(dim=2, keepdim=True).expand_as(x_BnCR)
        task_BCH, direct_BCR = condition_BCT.split([self.task.out_features, self.direct.out_features], dim=-1)
        hidden = self.row(torch.cat([x_BnCR, common_BnCR], dim=-1))
        hidden = hidden + task_BCH.unsqueeze(1) + self.time(time_Bn).unsqueeze(2)
        for index in range(len(self.blocks)):
            hidden = self.blocks.run(index, hidden)
        return self.out(self.norm(hidden)) + direct_BCR.unsqueeze(1)


def _class_means(samples_BSF: Tensor, labels_BS: Tensor, num_classes: int) -> Tensor:
    """Returns the mean of the samples of each class, `(B, C, F)`."""
    member_BSC = class_members(labels_BS, num_classes, samples_BSF.dtype)
    share_BSC = member_BSC / member_BSC.sum(dim=1, keepdim=True).clamp(min=1.0)
    return share_BSC.transpose(1, 2) @ samples_BSF


def _products(weight_BACF: Tensor, centre_BF: Tensor) -> Tensor:
    """Returns `w . c` in units of the bias, `(B, A, C)`."""
    return torch.einsum("bkcf,bf->bkc", weight_BACF, centre_BF) * centre_BF.shape[-1] ** -0.5


def _with_square(known_BCI: Tensor) -> Tensor:
    """Returns support means with their squared lengths, `(B, C, F + 1)`, all of about the means' size."""
    own_BCF, _ = known_BCI.chunk(2, dim=-1)
    square_BC1 = own_BCF.square().mean(dim=-1, keepdim=True)
    # What all classes have in common changes no decision, and would make biases large.
    return torch.cat([own_BCF, square_BC1 - square_BC1.mean(dim=1, keepdim=True)], dim=-1)


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
        num_values: D, values of the network.
        num_features: F.
        max_classes: Most classes a task may have.
        width: H.
        num_layers: Residual blocks for the task, and as many for the values.
    """

    def __init__(self, num_values: int, num_features: int, max_classes: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.condition_width = width
        self.samples = SampleEncoder(num_features, max_classes, width)
        self.condition = nn.Sequential(*(_ResidualMLP(width) for _ in range(num_layers)), nn.LayerNorm(width))
        self.time = TimeEncoder(width)
        self.values = nn.Linear(num_values, width)
        self.blocks = Blocks(_ResidualMLP(width) for _ in range(num_layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_values))

    def embed_condition(self, samples_BSF: Tensor, labels_BS: Tensor) -> Tensor:
        """Embeds B sets of labelled samples, `(B, H)`."""
        return self.condition(self.samples(samples_BSF, labels_BS))

    def forward(self, x_BnD: Tensor, time_Bn: Tensor, condition_BH: Tensor) -> Tensor:
        """Returns predicted values `(B, n, D)`, given noised values, fractions of the chain and embedded conditions."""
        hidden = self.values(x_BnD) + self.time(time_Bn) + condition_BH.unsqueeze(1)
        for index in range(len(self.blocks)):
            hidden = self.blocks.run(index, hidden)
        return self.out(hidden)


class _ResidualMLP(nn.Module):
    """A residual block of a perceptron, over any leading dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class ChunkDenoiser(nn.Module):
    """Denoises a network, or a window of it, cut into chunks that attend to each other.

    Args:
        chunk_length: K.
        num_position_features: G.
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
        num_position_features: int,
        num_features: int,
        max_classes: int,
        width: int,
        num_layers: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.condition_width = width
        self.samples = SampleEncoder(num_features, max_classes, width)
        self.condition = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.position = PositionEncoder(num_position_features, width)
        self.time = TimeEncoder(width)
        self.chunk = nn.Linear(chunk_length, width)
        self.trunk = Transformer(width, num_layers, num_heads, is_causal=False)
        self.out = nn.Linear(width, chunk_length)

    def embed_condition(self, samples_BSF: Tensor, labels_BS: Tensor) -> Tensor:
        """Embeds B sets of labelled samples, `(B, H)`."""
        return self.condition(self.samples(samples_BSF, labels_BS))

    def forward(self, x_BnMK: Tensor, time_Bn: Tensor, condition_BH: Tensor, positions_MG: Tensor) -> Tensor:
        """Returns predicted chunks `(B, n, M, K)` of whole networks or of windows.

        Args:
            x_BnMK: Noised chunks.
            time_Bn: Fractions of the chain that are done.
            condition_BH: The result of `embed_condition`.
            positions_MG: Position features of the chunks, the same for all networks or `(B, M, G)`.
        """
        B, n = time_Bn.shape
        positions_MH = self.position(positions_MG)
        condition_B1H = condition_BH.unsqueeze(1)
        placed_BMH = positions_MH + condition_B1H + positions_MH * condition_B1H
        hidden = self.chunk(x_BnMK) + placed_BMH.unsqueeze(1) + self.time(time_Bn).unsqueeze(2)
        return self.out(self.trunk(hidden.flatten(0, 1))).unflatten(0, (B, n))
