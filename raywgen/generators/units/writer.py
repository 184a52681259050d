"""Writes a network layer after layer, from one vector for each of its units.

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
    UnitAxis,
    UnitLayout,
    UnitTensor,
    place_features,
    unit_layout,
)
from raywgen.generators.units.codes import NUM_CODE, unit_codes
from raywgen.generators.units.fitted_output import FittedOutput
from raywgen.generators.units.samples import Activations, Facts
from raywgen.weights import KeyedNoise, Layout

# One number of each unit for each kind of vector, for its row's scale, and for how much of the inputs' mean it sees.
_SCALARS = ("bias", "norm_scale", "norm_shift", "running_mean", "running_var", "gain", "sees_mean", "fitted")
_BIAS_SCALE = 0.3
_NORM_SCALE = 0.1
_GAIN_SCALE = 0.3
_MOST_GAIN = 3.0
_FIRST_OUTPUT = 0.1
_MEAN_HIDDEN = -4.0
_FITTED = 2.0
_MOST_LOG = 8.0
_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class _Roles:
    """The parts of an axis's units: their vectors, a row's side of a product, and a number for each kind of vector."""

    unit_BnH: Tensor
    row_BnR: Tensor
    scalar: dict[str, Tensor]


class UnitWriter(nn.Module):
    """Describes each unit by a vector from its code, its axis and the task, and writes tensors from these.

    A matrix is `W[j, i] = gain * row_j . column_i / sqrt(R)`, so it may have any number of rows and columns; a kernel,
    or a row that reads a flattened channel, has a `column_i` for each place. A column also knows what the support set
    says of the value that it reads: the samples are followed through the layers as they are written.

    Networks without biases would easily end with all units of a layer off, where there is no gradient. Three things
    keep them from it. Biases begin as `-W mean`, and rows without a bias do not see the mean at first. Rows and biases
    have the mean zero over the units of an axis. Outputs are small at first, and both sides of a product keep their
    size, which a bounded gain alone changes: from larger outputs the nearest way down is to write zeros.

    To the rows of the outputs, those of a ridge regression to the samples are added, where these are followed to there.
    By how much is learned: layers may be others than they are taken for.

    Args:
        num_features: F, values of a sample.
        max_classes: Most classes of a task.
        width: H, which is R, too.
        num_layers: Blocks.
        fits_output: Whether the layer of outputs is fitted to the samples, too.
    """

    def __init__(self, num_features: int, max_classes: int, width: int, num_layers: int, fits_output: bool) -> None:
        super().__init__()
        H = width
        self.code = nn.Sequential(nn.Linear(NUM_CODE + NUM_AXIS_FACTS, H), nn.GELU(), nn.Linear(H, H), nn.LayerNorm(H))
        self.input_table = nn.Parameter(torch.randn(num_features, H))
        self.output_facts = nn.Linear(num_features, H)
        self.blocks = nn.ModuleList(_block(H) for _ in range(num_layers))
        # Of unit size like a unit's vector, but zero for a single place: matrices are written as if there were none.
        self.place = nn.Sequential(
            nn.Linear(NUM_PLACE_FEATURES, H, bias=False),
            nn.GELU(),
            nn.Linear(H, H, bias=False),
            nn.LayerNorm(H, elementwise_affine=False),
        )
        self.facts = nn.Linear(2 + 2 * max_classes, H, bias=False)
        self.place_block = _block(H)
        self.roles = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H + len(_SCALARS)))
        self.columns = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H))
        self.fitted = FittedOutput() if fits_output else None
        for head in (self.roles[1], self.columns[1]):
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=H**-0.5)
            nn.init.zeros_(head.bias)

    def forward(
        self, layout: Layout, task_BH: Tensor, support: Activations, noise: KeyedNoise, code_noise: float
    ) -> Tensor:
        """Returns flat vectors `(B, D)`, differentiable.

        Args:
            layout: Any layout.
            task_BH: The tasks, of about unit size.
            support: Their samples.
            noise: B rows of noise on the codes of units.
            code_noise: Its size.
        """
        units = unit_layout(layout)
        roles = self._all_roles(units, task_BH, support, noise, code_noise)
        written: dict[str, Tensor] = {}
        seen = {0: support} if units.is_followed else {}
        shift_Bn: dict[int, Tensor] = {}
        pooled = units.pooling(support.values_BSnP.shape[2])
        for tensor in units.tensors:
            if tensor.axis_in is None:
                continue
            given = _read(seen.get(tensor.axis_in), units, tensor)
            rows_BnX, mean_Bn = self._matrix(units, tensor, roles, None if given is None else given.facts())
            axis, scalar = units.axes[tensor.axis_out], roles[tensor.axis_out].scalar
            bias_Bn = _BIAS_SCALE * scalar["bias"] if axis.has_bias else None
            if self.fitted is not None and tensor.axis_out == units.output:
                fitted_BnX, fitted_Bn = self._fitted(self.fitted, given, axis, scalar)
                rows_BnX, mean_Bn = rows_BnX + fitted_BnX, None if mean_Bn is None else mean_Bn + fitted_Bn
            written[tensor.spec.name] = rows_BnX.flatten(1)
            if mean_Bn is not None and bias_Bn is not None:
                shift_Bn[tensor.axis_out] = bias_Bn = bias_Bn + mean_Bn
            if given is not None and tensor.axis_out != units.output:
                with torch.no_grad():
                    made = given.through(rows_BnX, tensor.grid if tensor.is_kernel else None).rectified(bias_Bn)
                    seen[tensor.axis_out] = made.pooled(pooled) if tensor.is_kernel else made
        for tensor in units.tensors:
            if tensor.axis_in is None:
                values_Bn = _vector(tensor, roles[tensor.axis_out].scalar, shift_Bn.get(tensor.axis_out))
                written[tensor.spec.name] = values_Bn[:, : tensor.spec.num_values]
        return torch.cat([written[spec.name] for spec in layout.generated], dim=1)

    def _fitted(
        self, fitted: FittedOutput, given: Activations | None, axis: UnitAxis, scalar: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns what is added to the rows `(B, n, X)` and biases `(B, n)` of the outputs."""
        share_B11 = torch.sigmoid(scalar["fitted"].mean(dim=1) + _FITTED)[:, None, None]
        if given is None:
            # Zero, and yet every parameter has a gradient whatever the layout.
            nothing_B11 = 0.0 * share_B11 * sum(fitted.parameters())
            return nothing_B11, nothing_B11.squeeze(-1)
        rows_BnX, bias_Bn = fitted(given, axis.num_units, axis.has_bias)
        return share_B11 * rows_BnX, share_B11.squeeze(-1) * bias_Bn

    def _all_roles(
        self, units: UnitLayout, task_BH: Tensor, support: Activations, noise: KeyedNoise, code_noise: float
    ) -> list[_Roles]:
        device, sizes = task_BH.device, [axis.num_units for axis in units.axes]
        codes = []
        for place, (size, facts_Q) in enumerate(zip(sizes, units.facts().to(device), strict=True)):
            code_Bnc = unit_codes(size).to(device).expand(len(task_BH), -1, -1)
            # Inputs and outputs are what they are; only hidden units may be others.
            if code_noise and place not in (0, units.output):
                code_Bnc = code_Bnc + code_noise * noise.normal(size, NUM_CODE)
            codes.append(torch.cat([code_Bnc, facts_Q.expand(len(task_BH), size, -1)], dim=-1))
        input_1nH = self.code(codes[0][:1]) + self._inputs(sizes[0])
        # All axes at once: small products one after another would cost more than they compute.
        unit_BnH = self.code(torch.cat([codes[0][:, :0], *codes[1:]], dim=1))
        task_B1H = task_BH.unsqueeze(1)
        x_BnH = unit_BnH + task_B1H + unit_BnH * task_B1H
        if units.output:
            parts = list(x_BnH.split(sizes[1:], dim=1))
            parts[units.output - 1] = parts[units.output - 1] + self._outputs(sizes[units.output], support)
            x_BnH = torch.cat(parts, dim=1)
        for block in self.blocks:
            x_BnH = x_BnH + block(x_BnH)
        H = task_BH.shape[1]
        # There are many inputs, and what a unit reads of them has a block of its own.
        x_BnH = torch.cat([input_1nH + task_B1H + input_1nH * task_B1H, x_BnH], dim=1)
        roles_BnX = self.roles(x_BnH)
        return [
            _roles(x_BnH, roles_BnX[..., :H], roles_BnX[..., H:])
            for x_BnH, roles_BnX in zip(x_BnH.split(sizes, dim=1), roles_BnX.split(sizes, dim=1), strict=True)
        ]

    def _inputs(self, num_units: int) -> Tensor:
        """Returns what is learned of each input, `(n, H)`, or of each channel; nothing of other inputs."""
        if len(self.input_table) % num_units:
            # Zero times the mean, so that every parameter has a gradient whatever the layout.
            return 0.0 * self.input_table.mean(dim=0, keepdim=True)
        return self.input_table.unflatten(0, (num_units, -1)).mean(dim=1)

    def _outputs(self, num_units: int, support: Activations) -> Tensor:
        """Returns what the samples say of each class `(B, n, H)`; nothing of outputs beyond the known classes."""
        x_BCH = self.output_facts(support.facts().directions())[:, :num_units]
        return nn.functional.pad(x_BCH, (0, 0, 0, num_units - x_BCH.shape[1]))

    def _columns(self, unit_BnH: Tensor, tensor: UnitTensor, facts: Facts | None) -> Tensor:
        """Returns the columns' side of a product, `(B, n * V, R)`: one for each place of each unit."""
        place_VH = self.place(place_features(tensor.grid, tensor.is_kernel).to(unit_BnH.device))
        unit_Bn1H = unit_BnH.unsqueeze(2)
        x_BnVH = unit_Bn1H + place_VH + unit_Bn1H * place_VH
        num_features = self.facts.in_features
        if facts is None:
            known_BnVQ = unit_BnH.new_zeros(*x_BnVH.shape[:3], num_features)
        else:
            known_BnVQ = facts.features().view(len(unit_BnH), unit_BnH.shape[1], -1, num_features)
        x_BXH = (x_BnVH + self.facts(known_BnVQ)).flatten(1, 2)
        return self.columns(x_BXH + self.place_block(x_BXH))

    def _matrix(
        self, units: UnitLayout, tensor: UnitTensor, roles: list[_Roles], facts: Facts | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns rows `(B, n, X)`, and `-W mean` `(B, n)` for units with a bias."""
        assert tensor.axis_in is not None
        rows = roles[tensor.axis_out]
        column_BXR = self._columns(roles[tensor.axis_in].unit_BnH, tensor, facts)
        R, num_values = rows.row_BnR.shape[-1], column_BXR.shape[1]
        gain = _FIRST_OUTPUT if tensor.axis_out == units.output else math.sqrt(2)
        scale_B = gain * (_MOST_GAIN * (_GAIN_SCALE * rows.scalar["gain"].mean(dim=1)).tanh()).exp()
        product_BnX = R**-0.5 * _of_unit_size(rows.row_BnR) @ _of_unit_size(column_BXR).mT
        if facts is None:
            return product_BnX * (num_values**-0.5 * scale_B)[:, None, None], None
        times = num_values // facts.mean_BX.shape[1]
        scale_B = scale_B * (times * facts.variance_BX.sum(dim=1)).clamp(min=_LEAST).rsqrt()
        rows_BnX = product_BnX * scale_B[:, None, None]
        axis = units.axes[tensor.axis_out]
        mean_BX = facts.mean_BX.repeat_interleave(times, dim=1)
        seen_Bn = (rows_BnX @ mean_BX.unsqueeze(-1)).squeeze(-1)
        if axis.has_bias:
            return rows_BnX, -seen_Bn
        hidden_Bn = 1 - torch.sigmoid(_GAIN_SCALE * rows.scalar["sees_mean"] + _MEAN_HIDDEN)
        along_B1X = mean_BX.unsqueeze(1) / mean_BX.square().sum(dim=1).clamp(min=_LEAST)[:, None, None]
        return rows_BnX - (hidden_Bn * seen_Bn).unsqueeze(-1) * along_B1X, None


def _read(given: Activations | None, units: UnitLayout, tensor: UnitTensor) -> Activations | None:
    """Returns the values as a tensor reads them; None where nothing is known of them."""
    assert tensor.axis_in is not None
    num_units = units.axes[tensor.axis_in].num_units
    if given is None:
        return None
    is_flat = given.grid == (1, 1)
    if tensor.is_kernel:
        given = given.as_maps(num_units) if is_flat else given
        return given if given is not None and given.values_BSnP.shape[2] == num_units else None
    if not is_flat:
        given = given.on_grid(tensor.grid)
    return given if given.values_BSnP.shape[2] == num_units * tensor.num_places else None


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def _roles(unit_BnH: Tensor, row_BnR: Tensor, scalar_Bns: Tensor) -> _Roles:
    scalar = dict(zip(_SCALARS, scalar_Bns.unbind(dim=-1), strict=True))
    return _Roles(unit_BnH, _centred(row_BnR), scalar | {"bias": _centred(scalar["bias"])})


def _of_unit_size(x_BnR: Tensor) -> Tensor:
    return x_BnR * x_BnR.square().mean(dim=(1, 2), keepdim=True).clamp(min=_LEAST).rsqrt()


def _centred(x: Tensor) -> Tensor:
    """Subtracts the mean over an axis's units, if there are several."""
    return x - x.mean(dim=1, keepdim=True) if x.shape[1] > 1 else x


def _vector(tensor: UnitTensor, scalar: dict[str, Tensor], shifted_Bn: Tensor | None) -> Tensor:
    """Returns a vector `(B, n)` by its kind; `shifted_Bn` is the bias of units that do not see the mean."""
    kind = tensor.spec.kind
    if kind == "norm_scale":
        return 1 + _NORM_SCALE * scalar[kind]
    if kind in ("norm_shift", "running_mean"):
        return _NORM_SCALE * scalar[kind]
    if kind == "running_var":
        return (_NORM_SCALE * scalar[kind]).clamp(-_MOST_LOG, _MOST_LOG).exp()
    return _BIAS_SCALE * scalar["bias"] if shifted_Bn is None else shifted_Bn
