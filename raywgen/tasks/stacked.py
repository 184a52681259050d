"""Many networks of one architecture run at once."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

# Cached, because for small networks finding the names would take longer than the call itself.
_TIED: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def stacked_logits(module: nn.Module, state_N: dict[str, Tensor], x: Tensor) -> Tensor:
    """Returns the outputs `(N, S, C)` of N networks, differentiable in their weights.

    Args:
        module: Any network of the architecture; its mode (train or eval) holds, its own values are not used.
            In train mode a network writes its running statistics into `state_N`.
        state_N: A `state_dict` whose tensors, buffers too, have a leading dimension N.
        x: Inputs `(S, F)` for all networks, or `(N, S, F)`.
    """

    def call(state: dict[str, Tensor], x_SF: Tensor) -> Tensor:
        return functional_call(module, state, (x_SF,))

    state_N = without_ties(module, state_N)
    return vmap(call, in_dims=(0, 0 if x.dim() == 3 else None))(state_N, x)


def without_ties(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a `state_dict` as `functional_call` takes it: with the first name of each tied tensor."""
    if tied := _tied_names(module):
        return {name: tensor for name, tensor in state.items() if name not in tied}
    return state


def _tied_names(module: nn.Module) -> frozenset[str]:
    """Returns the names in a `state_dict` of tensors that also have an earlier name."""
    if module not in _TIED:
        first: dict[int, str] = {}
        state = module.state_dict(keep_vars=True)
        _TIED[module] = frozenset(name for name, tensor in state.items() if first.setdefault(id(tensor), name) != name)
    return _TIED[module]


def balanced_cross_entropy(logits_NSC: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy `(N,)` in nats, in which every class present has the same weight.

    Args:
        logits_NSC: Outputs.
        labels: int64 `(N, S)`, or `(S,)` for all networks.
    """
    member_NSC, share_NSC = _class_shares(logits_NSC, labels)
    log_p_NSC = logits_NSC.log_softmax(dim=-1)
    return -(log_p_NSC * member_NSC * share_NSC).sum(dim=(1, 2))


def balanced_accuracy(logits_NSC: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean recall over the classes present, `(N,)`; arguments as in `balanced_cross_entropy`."""
    member_NSC, share_NSC = _class_shares(logits_NSC, labels)
    right_NSC = torch.nn.functional.one_hot(logits_NSC.argmax(dim=-1), logits_NSC.shape[-1])
    return (right_NSC * member_NSC * share_NSC).sum(dim=(1, 2))


def _class_shares(logits_NSC: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns one-hot labels `(N, S, C)`, and the weight of a sample of each class `(N, 1, C)`."""
    labels_NS = labels.expand(logits_NSC.shape[:2])
    member_NSC = torch.nn.functional.one_hot(labels_NS, logits_NSC.shape[-1]).to(logits_NSC.dtype)
    count_N1C = member_NSC.sum(dim=1, keepdim=True)
    num_present_N11 = (count_N1C > 0).sum(dim=2, keepdim=True)
    return member_NSC, 1 / (count_N1C.clamp(min=1) * num_present_N11)
