"""Corrects running statistics of batch normalisation for weights that have changed, from unlabelled inputs.

Decoded weights give other activations, while running means and variances still describe the old ones. Shifting these by
the change of the activations costs no storage, and is the most effective correction at few bits.

Here D counts channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_Moments = tuple[Tensor, Tensor]


Statistics = Literal["stored", "batch"]


def differentiable(module: nn.Module, statistics: Statistics) -> nn.Module:
    """Returns a module that takes running statistics by `functional_call` and lets gradients flow to them.

    Torch's own layers refuse such statistics. The result normalises in the same way in training and evaluation mode and
    does not update statistics. Without batch normalisation it is the module itself, otherwise a copy.

    Args:
        module: Any network.
        statistics: `stored` normalises by the running statistics, `batch` by those of the inputs at hand.
    """
    if not _layers(module):
        return module
    module = copy.deepcopy(module)
    for name, layer in _layers(module).items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, _Normalisation(layer, statistics))
    return module


class _Normalisation(nn.Module):
    """`(x - m) / sqrt(v + eps) * weight + bias`, with parameters and buffers named as in a batch normalisation."""

    def __init__(self, layer: _BatchNorm, statistics: Statistics) -> None:
        super().__init__()
        self.running_mean: Tensor
        self.running_var: Tensor
        self._statistics, self._eps = statistics, layer.eps
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        if self._statistics == "batch":
            return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self._eps)
        shape = (-1,) + (1,) * (x.dim() - 2)
        normal = (x - self.running_mean.view(shape)) * (self.running_var + self._eps).rsqrt().view(shape)
        return normal if self.weight is None else normal * self.weight.view(shape) + self.bias.view(shape)


@torch.no_grad()
def reestimate_statistics(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Returns statistics of the module's activations on `x` alone, as `state_dict` entries; the module does not change.

    Each layer is measured after the statistics of the layers before it have been replaced.

    Args:
        module: The network whose statistics are estimated.
        x: One batch of inputs, the larger the better.
    """
    return _replaced(module, x, lambda name, layer, moments: moments)


@torch.no_grad()
def match_statistics(module: nn.Module, original: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Returns the original's statistics, shifted by the change of the activations on `x` from `original` to `module`.

        mean = m + (mean_0 - m_0) * sqrt(v / v_0),    variance = variance_0 * v / v_0

    with m, v of `module` and m_0, v_0 of `original`, both on `x`. With equal weights nothing changes,
    however few the inputs are and whatever their source, unlike in `reestimate_statistics`. A scale and shift of a
    channel is undone exactly.

    Args:
        module: The network with changed weights.
        original: The network before, of the same architecture, with its statistics.
        x: One batch of inputs.
    """
    before: dict[str, _Moments] = {}
    own = {name: (mean_D.clone(), variance_D.clone()) for name, mean_D, variance_D in _statistics(original)}

    def keep(name: str, layer: nn.Module, moments: _Moments) -> _Moments:
        before[name] = moments
        return own[name]

    def move(name: str, layer: nn.Module, moments: _Moments) -> _Moments:
        (mean_D, variance_D), (old_mean_D, old_variance_D) = own[name], before[name]
        ratio_D = moments[1] / old_variance_D.clamp(min=1e-12)
        # The variance of a channel that is constant on these inputs cannot be measured.
        ratio_D = torch.where(old_variance_D > 1e-12, ratio_D, torch.ones_like(ratio_D))
        return moments[0] + (mean_D - old_mean_D) * ratio_D.sqrt(), variance_D * ratio_D

    _replaced(original, x, keep)
    return _replaced(module, x, move)


def _replaced(
    module: nn.Module, x: Tensor, choose: Callable[[str, nn.Module, _Moments], _Moments]
) -> dict[str, Tensor]:
    """Returns the statistics after a pass in which those of each layer are replaced just before it runs."""
    module = copy.deepcopy(module).eval()
    for name, layer in _layers(module).items():
        layer.register_forward_pre_hook(partial(_replace, partial(choose, name)))
    module(x)
    return {
        f"{name}.{key}": value
        for name, mean_D, variance_D in _statistics(module)
        for key, value in (("running_mean", mean_D), ("running_var", variance_D))
    }


def _replace(choose: Callable[[nn.Module, _Moments], _Moments], layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    variance_D, mean_D = torch.var_mean(inputs[0].transpose(0, 1).flatten(1), dim=1)
    mean_D, variance_D = choose(layer, (mean_D, variance_D))
    layer.running_mean.copy_(mean_D)
    layer.running_var.copy_(variance_D)


def _layers(module: nn.Module) -> Mapping[str, _BatchNorm]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def _statistics(module: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    return [
        (name, layer.running_mean, layer.running_var)
        for name, layer in _layers(module).items()
        if layer.running_mean is not None and layer.running_var is not None
    ]
