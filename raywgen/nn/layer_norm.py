"""Corrects layer normalisations for weights that have changed, from unlabelled inputs.

Layer normalisation keeps no statistics, but what decoded weights do to its outputs is, to first order, a scale and a
shift of every channel. Its own weight and bias undo both, and cost no storage beyond their own.

Here D counts channels and X positions of all inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

_LEAST_DEVIATION = 1e-6
_Moments = tuple[Tensor, Tensor]


@torch.no_grad()
def match_layer_norms(
    module: nn.Module, original: nn.Module, inputs: Mapping[str, Tensor], is_real: Tensor
) -> dict[str, Tensor]:
    """Returns weights and biases by which each channel of each output has the original's mean and deviation.

        weight = sign(weight_0) * deviation_0 / deviation,    bias = mean_0 - weight * mean

    with mean_0, deviation_0 of the original's output, and mean, deviation of what `module` normalises, before weight
    and bias; all on the same inputs. Each layer is measured after those before it have been corrected. With equal
    weights nothing changes, and a module that differs in these weights and biases alone is restored.

    Args:
        module: The network with changed weights; it does not change.
        original: The network before, of the same architecture.
        inputs: Keyword arguments of both networks.
        is_real: Whether a position counts, bool; each layer normalises `(*is_real.shape, D)`.

    Returns:
        Entries of the `state_dict`.
    """
    targets: dict[str, _Moments] = {}
    _run(original, inputs, lambda name, layer, x_XD: targets.update({name: _moments(_output(layer, x_XD))}), is_real)
    module = copy.deepcopy(module)
    _run(module, inputs, lambda name, layer, x_XD: _match(layer, x_XD, *targets[name]), is_real)
    return {
        f"{name}.{key}": value.detach() for name, layer in _layers(module) for key, value in layer.named_parameters()
    }


def _run(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    see: Callable[[str, nn.LayerNorm, Tensor], None],
    is_real: Tensor,
) -> None:
    """Shows `see` what each layer normalises, without weight and bias, just before it runs."""

    def before(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.LayerNorm)
        real_XD = given[0][is_real]
        see(name, layer, nn.functional.layer_norm(real_XD, layer.normalized_shape, eps=layer.eps))

    handles = [layer.register_forward_pre_hook(partial(before, name)) for name, layer in _layers(module)]
    try:
        module.eval()(**inputs)
    finally:
        for handle in handles:
            handle.remove()


def _match(layer: nn.LayerNorm, x_XD: Tensor, mean_D: Tensor, deviation_D: Tensor) -> None:
    own_mean_D, own_deviation_D = _moments(x_XD)
    # The deviation of a channel that is constant on these inputs cannot be measured.
    is_known_D = own_deviation_D > _LEAST_DEVIATION
    ratio_D = deviation_D / own_deviation_D.clamp(min=_LEAST_DEVIATION)
    weight_D = torch.where(is_known_D, torch.where(layer.weight < 0, -ratio_D, ratio_D), layer.weight)
    layer.weight.copy_(weight_D)
    layer.bias.copy_(mean_D - weight_D * own_mean_D)


def _output(layer: nn.LayerNorm, x_XD: Tensor) -> Tensor:
    return x_XD * layer.weight + layer.bias


def _moments(x_XD: Tensor) -> _Moments:
    deviation_D, mean_D = torch.std_mean(x_XD.double(), dim=0, correction=0)
    return mean_D.float(), deviation_D.float()


def _layers(module: nn.Module) -> list[tuple[str, nn.LayerNorm]]:
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.LayerNorm) and layer.elementwise_affine and len(layer.normalized_shape) == 1
    ]
