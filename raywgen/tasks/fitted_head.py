"""Networks whose linear head is fitted to labelled examples rather than trained or generated.

Such a network says so by `fits_head`, has the head's tensors by the names of `head_names`, and gives its features by
the module that `without_head()` returns. Ridge regression on the examples gives weights and biases in closed form, so a
generator is trained through them, and what it writes has them in place.

Shape letters beyond the legend in `raywgen.weights`: N networks, X further samples.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from raywgen.tasks.ridge_head import RidgeHead, fit_ridge_head
from raywgen.tasks.stacked import stacked_logits
from raywgen.weights import Layout

SHARPNESS = 6.0
"""Number that outputs of ridge regression are multiplied by to be logits; targets of two classes are 1 apart."""


class HeadFitting(Protocol):
    """A module whose head is fitted."""

    @property
    def head_names(self) -> tuple[str, str]:
        """Names of the head's weight `(C, E)` and bias `(C,)` in the `state_dict`."""
        ...

    def without_head(self) -> nn.Module:
        """A module with the same other tensors that returns features `(S, E)`."""
        ...


def fits_head(module: nn.Module) -> bool:
    """Whether a network's head is fitted to examples."""
    return bool(getattr(module, "fits_head", False))


def fitted_logits(
    module: nn.Module, state_N: dict[str, Tensor], support_NSF: Tensor, labels_NS: Tensor, x_NXF: Tensor
) -> Tensor:
    """Returns logits `(N, X, C)` of networks with heads fitted to their examples, differentiable in all other weights.

    Args:
        module: A network whose head is fitted.
        state_N: A `state_dict` whose tensors have a leading dimension N; its head is not used.
        support_NSF: The examples of each network.
        labels_NS: Their classes, int64.
        x_NXF: The samples to judge.
    """
    num = support_NSF.shape[1]
    features_NXE = stacked_features(module, state_N, torch.cat([support_NSF, x_NXF], dim=1))
    return SHARPNESS * _fitted(module, state_N, features_NXE[:, :num], labels_NS)(features_NXE[:, num:])


@torch.no_grad()
def with_fitted_heads(
    module: nn.Module, layout: Layout, values_ND: Tensor, support_NSF: Tensor, labels_NS: Tensor
) -> tuple[Tensor, Tensor]:
    """Replaces the heads of networks by those fitted to their examples.

    Args:
        module: A network whose head is fitted; its own values are not used.
        layout: Layout of the networks.
        values_ND: Flat vectors.
        support_NSF: The examples of each network.
        labels_NS: Their classes, int64.

    Returns:
        The flat vectors, and logits `(N, S, C)` for each example by the head that was fitted to all others.
    """
    state_N = layout.unflatten(values_ND)
    head = _fitted(module, state_N, stacked_features(module, state_N, support_NSF), labels_NS)
    weight, bias = cast(HeadFitting, module).head_names
    state_N[weight], state_N[bias] = SHARPNESS * head.weight_BEC.transpose(1, 2), SHARPNESS * head.bias_BC
    each = [{name: tensor[n] for name, tensor in state_N.items()} for n in range(len(values_ND))]
    return torch.stack([layout.flatten(state) for state in each]), SHARPNESS * head.left_out_BSC


def stacked_features(module: nn.Module, state_N: dict[str, Tensor], x: Tensor) -> Tensor:
    """Returns features `(N, S, E)` of networks whose head is fitted; arguments as in `stacked_logits`."""
    network = cast(HeadFitting, module)
    others_N = {name: tensor for name, tensor in state_N.items() if name not in network.head_names}
    return stacked_logits(network.without_head(), others_N, x)


def _fitted(module: nn.Module, state_N: dict[str, Tensor], features_NSE: Tensor, labels_NS: Tensor) -> RidgeHead:
    weight, _ = cast(HeadFitting, module).head_names
    return fit_ridge_head(features_NSE, labels_NS, state_N[weight].shape[1])
