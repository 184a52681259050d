"""Writes every tensor of a network from one vector for each of its units.

Shape letters beyond the legend in `raywgen.weights`: n units of an axis, R numbers of a unit's side of a product, V
places of a pair of units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raywgen.generators.units.axes import (
    NUM_AXIS_FACTS,
    NUM_PLACE_FEATURES,
    UnitLayout,
    UnitTensor,
    place_features,
    unit_layout,
)
from raywgen.generators.units.codes import NUM_CODE, unit_codes
from raywgen.generators.units.samples import SupportFacts
from raywgen.weights import KeyedNoise, Layout

# One number of each unit for each kind of vector, for its row's scale, and for how much of the inputs' mean it sees.
_SCALARS = ("bias", "norm_scale", "norm_shift", "running_mean", "running_var", "gain", "sees_mean")
_BIAS_SCALE = 0.3
_NORM_SCALE = 0.1
_GAIN_SCALE = 0.3
_MEAN_HIDDEN = -4.0
_MOST_LOG = 8.0
_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class _Roles:
    """The parts of an axis's units: a row's and a column's side of a product, and a number for each kind of vector."""

    row_BnR: Tensor
    column_BnR: Tensor
    scalar: dict[str, Tensor]


class UnitWriter(nn.Module):
    """Describes each unit by a vector from its code, its axis and the task, and writes tensors from these.

    A matrix is `W[j, i] = gain * row_j . column_i / sqrt(R)`, so it may have any number of rows and columns; a kernel
    has `column_i` changed by each of its places. Initial networks have the variances of He et al. 2015 for inputs that
    are centred: biases begin as `-W mean`, and rows without a bias do not see the mean at first. Otherwise inputs that
    are never negative would drive all of a unit's samples one way. Rows and biases have the mean zero over the units of
    an axis, so that whatever the sample not all units of a layer are off: such a network has no gradient, and training
    by the task's loss stays at chance.

    Args:
        num_features: F, values of a sample.
        max_classes: Most classes of a task.
        width: H, which is R, too.
        num_layers: Blocks.
    """

    def __init__(self, num_features: int, max_classes: int, width: int, num_layers: int) -> None:
        super().__init__()
        H = width
        self.code = nn.Sequential(nn.Linear(NUM_CODE + NUM_AXIS_FACTS, H), nn.GELU(), nn.Linear(H, H), nn.LayerNorm(H))
        self.input_table = nn.Parameter(torch.randn(num_features, H))
        self.input_facts = nn.Linear(2 + max_classes, H)
        self.output_facts = nn.Linear(num_features, H)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 2 * H), nn.GELU(), nn.Linear(2 * H, H))
            for _ in range(num_layers)
        )
        self.place = nn.Linear(NUM_PLACE_FEATURES, H, bias=False)
        self.roles = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 2 * H + len(_SCALARS)))
        head = self.roles[1]
        assert isinstance(head, nn.Linear)
        nn.init.normal_(head.weight, std=H**-0.5)
        nn.init.zeros_(head.bias)
        nn.init.normal_(self.place.weight, std=NUM_PLACE_FEATURES**-0.5)

    def forward(
        self, layout: Layout, task_BH: Tensor, support: SupportFacts, noise: KeyedNoise, code_noise: float
    ) -> Tensor:
        """Returns flat vectors `(B, D)`, differentiable.

        Args:
            layout: Any layout.
            task_BH: The tasks, of about unit size.
            support: Their samples' facts.
            noise: B rows of noise on the codes of units.
            code_noise: Its size.
        """
        units = unit_layout(layout)
        roles = self._all_roles(units, task_BH, support, noise, code_noise)
        written: dict[str, Tensor] = {}
        shift_Bn: dict[int, Tensor] = {}
        for tensor in units.tensors:
            if tensor.axis_in is not None:
                rows_BnX, mean_Bn = self._matrix(units, tensor, roles, support)
                written[tensor.spec.name] = rows_BnX.flatten(1)
                if mean_Bn is not None:
                    shift_Bn[tensor.axis_out] = mean_Bn
        for tensor in units.tensors:
            if tensor.axis_in is None:
                values_Bn = _vector(tensor, roles[tensor.axis_out].scalar, shift_Bn.get(tensor.axis_out))
                written[tensor.spec.name] = values_Bn[:, : tensor.spec.num_values]
        return torch.cat([written[spec.name] for spec in layout.generated], dim=1)

    def _all_roles(
        self, units: UnitLayout, task_BH: Tensor, support: SupportFacts, noise: KeyedNoise, code_noise: float
    ) -> list[_Roles]:
        device, sizes = task_BH.device, [axis.num_units for axis in units.axes]
        facts_AQ = units.facts().to(device)
        codes = []
        for size, facts_Q in zip(sizes, facts_AQ, strict=True):
            code_Bnc = unit_codes(size).to(device).expand(len(task_BH), -1, -1)
            if code_noise:
                code_Bnc = code_Bnc + code_noise * noise.normal(size, NUM_CODE)
            codes.append(torch.cat([code_Bnc, facts_Q.expand(len(task_BH), size, -1)], dim=-1))
        # All axes at once: small products one after another would cost more than they compute.
        unit_BnH = self.code(torch.cat(codes, dim=1))
        task_B1H = task_BH.unsqueeze(1)
        x_BnH = unit_BnH + task_B1H + unit_BnH * task_B1H
        parts = list(x_BnH.split(sizes, dim=1))
        parts[0] = parts[0] + self._inputs(sizes[0], support)
        parts[units.output] = parts[units.output] + self._outputs(sizes[units.output], support)
        x_BnH = torch.cat(parts, dim=1)
        for block in self.blocks:
            x_BnH = x_BnH + block(x_BnH)
        H = task_BH.shape[1]
        return [
            _roles(role_Bns[..., :H], role_Bns[..., H : 2 * H], role_Bns[..., 2 * H :])
            for role_Bns in self.roles(x_BnH).split(sizes, dim=1)
        ]

    def _inputs(self, num_units: int, support: SupportFacts) -> Tensor:
        """Returns what the samples say of each input `(B, n, H)`, or of each channel; zeros where they have no such."""
        moments = [_standardised(support.mean_BF), _standardised(support.variance_BF.sqrt())]
        facts_BFn = torch.cat([torch.stack(moments, dim=-1), support.direction_BCF.mT], dim=-1)
        x_BFH = self.input_table + self.input_facts(facts_BFn)
        if x_BFH.shape[1] % num_units:
            # Zero times the mean, so that every parameter has a gradient whatever the layout.
            return 0.0 * x_BFH.mean(dim=1, keepdim=True)
        return x_BFH.unflatten(1, (num_units, -1)).mean(dim=2)

    def _outputs(self, num_units: int, support: SupportFacts) -> Tensor:
        """Returns what the samples say of each class `(B, n, H)`; nothing of outputs beyond the known classes."""
        x_BCH = self.output_facts(support.direction_BCF)[:, :num_units]
        return nn.functional.pad(x_BCH, (0, 0, 0, num_units - x_BCH.shape[1]))

    def _matrix(
        self, units: UnitLayout, tensor: UnitTensor, roles: list[_Roles], support: SupportFacts
    ) -> tuple[Tensor, Tensor | None]:
        """Returns rows `(B, n, X)`, and `-W mean` `(B, n)` for units with a bias that read the inputs."""
        assert tensor.axis_in is not None
        rows, columns = roles[tensor.axis_out], roles[tensor.axis_in]
        R = rows.row_BnR.shape[-1]
        place_VR = 1 + self.place(place_features(tensor.grid, tensor.is_kernel).to(rows.row_BnR.device))
        place_VR = place_VR / place_VR.detach().square().mean().sqrt()
        column_BXR = (columns.column_BnR.unsqueeze(2) * place_VR).flatten(1, 2)
        mean_BX, variance_B = _moments(units, tensor, support)
        gain = variance_B.clamp(min=_LEAST).rsqrt() * (1.0 if tensor.axis_out == units.output else math.sqrt(2))
        scale_B = gain * (_GAIN_SCALE * rows.scalar["gain"].mean(dim=1)).clamp(-_MOST_LOG, _MOST_LOG).exp()
        rows_BnX = rows.row_BnR @ column_BXR.mT * (scale_B * R**-0.5)[:, None, None]
        axis = units.axes[tensor.axis_out]
        if mean_BX is None or axis.has_norm:
            return rows_BnX, None
        seen_Bn = (rows_BnX @ mean_BX.unsqueeze(-1)).squeeze(-1)
        if axis.has_bias:
            return rows_BnX, -seen_Bn
        hidden_Bn = 1 - torch.sigmoid(_GAIN_SCALE * rows.scalar["sees_mean"] + _MEAN_HIDDEN)
        along_B1X = mean_BX.unsqueeze(1) / mean_BX.square().sum(dim=1).clamp(min=_LEAST)[:, None, None]
        return rows_BnX - (hidden_Bn * seen_Bn).unsqueeze(-1) * along_B1X, None


def _roles(row_BnR: Tensor, column_BnR: Tensor, scalar_Bns: Tensor) -> _Roles:
    scalar = dict(zip(_SCALARS, scalar_Bns.unbind(dim=-1), strict=True))
    return _Roles(_centred(row_BnR), column_BnR, scalar | {"bias": _centred(scalar["bias"])})


def _standardised(x_BF: Tensor) -> Tensor:
    """Scales numbers of inputs to mean 0 and size 1 over these, so that what all have in common hides no difference."""
    centred_BF = x_BF - x_BF.mean(dim=1, keepdim=True)
    return centred_BF / centred_BF.square().mean(dim=1, keepdim=True).sqrt().clamp(min=_LEAST)


def _centred(x: Tensor) -> Tensor:
    """Subtracts the mean over an axis's units, if there are several."""
    return x - x.mean(dim=1, keepdim=True) if x.shape[1] > 1 else x


def _moments(units: UnitLayout, tensor: UnitTensor, support: SupportFacts) -> tuple[Tensor | None, Tensor]:
    """Returns the mean `(B, X)` of what a row reads, where that is the inputs, and the sum of its variances `(B,)`."""
    assert tensor.axis_in is not None
    num_units, V = units.axes[tensor.axis_in].num_units, tensor.num_places
    unknown_B = torch.full_like(support.mean_BF[:, 0], float(num_units * V))
    if tensor.axis_in != 0:
        return None, unknown_B
    if not tensor.is_kernel and num_units * V == support.mean_BF.shape[1]:
        return support.mean_BF, support.variance_BF.sum(dim=1)
    channels = support.of_channels(num_units) if tensor.is_kernel else None
    if channels is None:
        return None, unknown_B
    mean_BI, variance_BI = channels
    return mean_BI.repeat_interleave(V, dim=1), V * variance_BI.sum(dim=1)


def _vector(tensor: UnitTensor, scalar: dict[str, Tensor], shift_Bn: Tensor | None) -> Tensor:
    """Returns a vector `(B, n)` by its kind."""
    kind = tensor.spec.kind
    if kind == "norm_scale":
        return 1 + _NORM_SCALE * scalar[kind]
    if kind in ("norm_shift", "running_mean"):
        return _NORM_SCALE * scalar[kind]
    if kind == "running_var":
        return (_NORM_SCALE * scalar[kind]).clamp(-_MOST_LOG, _MOST_LOG).exp()
    values_Bn = _BIAS_SCALE * scalar["bias"]
    return values_Bn if shift_Bn is None else values_Bn + shift_Bn
