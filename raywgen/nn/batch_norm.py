"""Corrects running statistics of batch normalisation for weights that have changed, from unlabelled inputs.

Decoded weights give other activations, while running means and variances still describe the old ones. Shifting these by
the change of the activations costs no storage, and is the most effective correction at few bits.

Here D counts channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_Moments = tuple[Tensor, Tensor]
Statistics = Literal["stored", "batch"]


class StatisticsError(ValueError):
    """Statistics that cannot be estimated; the message names the layer and the remedy."""


class NotFiniteError(StatisticsError):
    """Activations are NaN or infinite."""


def differentiable(module: nn.Module, statistics: Statistics) -> nn.Module:
    """Returns a module that takes running statistics by `functional_call` and lets gradients flow to them.

    Torch's own layers refuse such statistics. The result normalises in the same way in training and evaluation mode and
    does not update statistics. Without batch normalisation it is the module itself, otherwise a copy.

    Args:
        module: Any network.
        statistics: `stored` normalises by the running statistics, `batch` by those of the inputs at hand.
    """
    if not layers_with_statistics(module):
        return module
    module = copy.deepcopy(module)
    for name, layer in layers_with_statistics(module).items():
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
def reestimate_statistics(
    module: nn.Module,
    x: Tensor | Iterable[Tensor | Sequence[Tensor]],
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Returns statistics of the module's activations on `x` alone, as `state_dict` entries; the module does not change.

    Each layer is measured after those before it have been normalised by their moments on the same batch. With one batch
    these are the statistics that are returned. Of several batches the moments are pooled, each weighted by its number
    of values n_b:

        n = sum n_b,    mean = sum n_b m_b / n,    variance = sum ((n_b - 1) v_b + n_b (m_b - mean)^2) / (n - 1)

    which are exactly those of all inputs for the first layer, and close to them for later ones. Source: Wu and Johnson,
    "Rethinking 'Batch' in BatchNorm", 2021 (arXiv 2105.07576), section 3, with the variance between batches added.

    Args:
        module: The network whose statistics are estimated.
        x: One batch of inputs, the larger the better, or any number of batches, of which memory holds one at a time:
            of equal size and in random order, as of a shuffled `DataLoader`. Of a batch such as `(inputs, labels)` the
            first tensor is taken.
        on_progress: Called after each batch with the number of inputs so far.

    Returns:
        `running_mean` and `running_var` of each layer that ran, in the dtype of the module. Without batch normalisation
        nothing runs and nothing is returned.

    Raises:
        StatisticsError: There is no batch, or one has a single value in each channel of a layer.
        NotFiniteError: Activations are NaN or infinite.

    Examples:
        >>> module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> estimated = raywgen.reestimate_statistics(module, torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> estimated["0.running_mean"]
        tensor([1., 1.])
        >>> keys = module.load_state_dict(estimated, strict=False)
    """
    if not layers_with_statistics(module):
        return {}
    module = copy.deepcopy(module).eval()
    pooled: dict[str, _Pooled] = {}
    for name, layer in layers_with_statistics(module).items():
        layer.register_forward_pre_hook(partial(_replace, partial(_pool, pooled, name)))
    device = next(buffer.device for buffer in module.buffers())
    done = 0
    for batch in (x,) if isinstance(x, Tensor) else x:
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        module(inputs.to(device))
        _check_finite(pooled, done, len(inputs))
        done += len(inputs)
        if on_progress is not None:
            on_progress(done)
    if not done:
        raise StatisticsError("there is no batch of inputs to estimate statistics from; give at least one")
    return {
        f"{name}.{key}": value.to(layer.running_mean.dtype)
        for name, layer in layers_with_statistics(module).items()
        if name in pooled and layer.running_mean is not None
        for key, value in (("running_mean", pooled[name].mean_D), ("running_var", pooled[name].variance_D))
    }


class _Pooled:
    """Mean and variance of all batches so far, in float64."""

    def __init__(self) -> None:
        self._num = 0
        self.mean_D: Tensor = torch.zeros(())
        self._squares_D: Tensor = torch.zeros(())  # Sums of squared differences from the mean.

    def add(self, mean_D: Tensor, variance_D: Tensor, num: int) -> None:
        mean_D, variance_D, total = mean_D.double(), variance_D.double(), self._num + num
        difference_D = mean_D - self.mean_D.to(mean_D)
        self.mean_D = self.mean_D.to(mean_D) + difference_D * (num / total)
        between_D = difference_D.square() * (self._num * (num / total))
        self._squares_D = self._squares_D.to(mean_D) + (num - 1) * variance_D + between_D
        self._num = total

    @property
    def variance_D(self) -> Tensor:
        return self._squares_D / (self._num - 1)


def _pool(pooled: dict[str, _Pooled], name: str, layer: nn.Module, moments: _Moments, num: int) -> _Moments:
    if num < 2:
        raise StatisticsError(
            f"layer '{name}': a batch with a single value in each channel has no variance; give larger batches"
        )
    pooled.setdefault(name, _Pooled()).add(*moments, num)
    return moments


def _check_finite(pooled: Mapping[str, _Pooled], start: int, num: int) -> None:
    """Refuses moments that are not finite; the first layer that ran is named, as others follow from it."""
    # One look at all together, since each look waits for a GPU.
    means = torch.cat([one.mean_D + one.variance_D for one in pooled.values()]) if pooled else torch.zeros(1)
    if bool(means.isfinite().all()):
        return
    first = next(name for name, one in pooled.items() if not bool((one.mean_D + one.variance_D).isfinite().all()))
    raise NotFiniteError(
        f"activations before layer '{first}' are NaN or infinite on inputs {start} to {start + num - 1}; look for such "
        "values in the weights of the layers before it, or in the inputs"
    )


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

    def keep(name: str, layer: nn.Module, moments: _Moments, num: int) -> _Moments:
        before[name] = moments
        return own[name]

    def move(name: str, layer: nn.Module, moments: _Moments, num: int) -> _Moments:
        (mean_D, variance_D), (old_mean_D, old_variance_D) = own[name], before[name]
        ratio_D = moments[1] / old_variance_D.clamp(min=1e-12)
        # The variance of a channel that is constant on these inputs cannot be measured.
        ratio_D = torch.where(old_variance_D > 1e-12, ratio_D, torch.ones_like(ratio_D))
        return moments[0] + (mean_D - old_mean_D) * ratio_D.sqrt(), variance_D * ratio_D

    _replaced(original, x, keep)
    return _replaced(module, x, move)


def _replaced(
    module: nn.Module, x: Tensor, choose: Callable[[str, nn.Module, _Moments, int], _Moments]
) -> dict[str, Tensor]:
    """Returns the statistics after a pass in which those of each layer are replaced just before it runs."""
    module = copy.deepcopy(module).eval()
    for name, layer in layers_with_statistics(module).items():
        layer.register_forward_pre_hook(partial(_replace, partial(choose, name)))
    module(x)
    return {
        f"{name}.{key}": value
        for name, mean_D, variance_D in _statistics(module)
        for key, value in (("running_mean", mean_D), ("running_var", variance_D))
    }


def _replace(
    choose: Callable[[nn.Module, _Moments, int], _Moments], layer: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    x = inputs[0]
    num = x.numel() // len(layer.running_mean)
    # Half precision holds too few digits of a mean over many values.
    exact = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
    mean_D, variance_D = torch.zeros_like(layer.running_mean, **exact), torch.ones_like(layer.running_var, **exact)
    if num > 1:
        # The layer's own kernel takes a third of the time of `var_mean`.
        nn.functional.batch_norm(x, mean_D, variance_D, training=True, momentum=1.0)
    mean_D, variance_D = choose(layer, (mean_D, variance_D), num)
    layer.running_mean.copy_(mean_D)
    layer.running_var.copy_(variance_D)


def layers_with_statistics(module: nn.Module) -> Mapping[str, _BatchNorm]:
    """Returns the layers of batch normalisation that have running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def _statistics(module: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    return [
        (name, layer.running_mean, layer.running_var)
        for name, layer in layers_with_statistics(module).items()
        if layer.running_mean is not None and layer.running_var is not None
    ]
