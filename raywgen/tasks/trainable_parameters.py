"""The two things that can be trained: a stack of networks, or one network on its own.

Shape legend: N networks, T samples of a minibatch, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from raywgen.tasks.fit_config import FitConfig
from raywgen.tasks.stacked import stacked_logits


class Trainee(Protocol):
    """The parameters of one or several networks, and their loss on a minibatch."""

    parameters: list[Tensor]
    stacked: bool

    def losses(self, x_NTF: Tensor, labels_NT: Tensor) -> Tensor:
        """Returns the cross-entropy of every sample `(N, T)`."""
        ...

    def optimizer(self, config: FitConfig) -> torch.optim.Optimizer:
        """Builds the optimiser of the parameters."""
        ...

    def load_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], step: int) -> None:
        """Loads the result of `optimizer_tensors` at a step."""
        ...

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Returns moments and the like, named `KEY/PARAMETER`, with a leading dimension N."""
        ...

    def buffers(self) -> list[Tensor]:
        """Returns copies of running statistics."""
        ...

    def restore_buffers(self, kept: list[Tensor]) -> None:
        """Restores running statistics."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """Returns a copy of the `state_dict`, its tensors with a leading dimension N."""
        ...


class Stack:
    """N networks at once through `vmap`: matrix products become batched ones."""

    stacked = True

    def __init__(self, module: nn.Module, start_N: Mapping[str, Tensor]) -> None:
        self._module = module
        self._state_N = {name: tensor.detach().clone() for name, tensor in start_N.items()}
        # Buffers are part of the state, but the network itself writes them.
        self._names = [name for name, _ in module.named_parameters()]
        self.parameters = [self._state_N[name].requires_grad_() for name in self._names]

    def losses(self, x_NTF: Tensor, labels_NT: Tensor) -> Tensor:
        """Returns the cross-entropy of every sample `(N, T)`."""
        logits_NTC = stacked_logits(self._module, self._state_N, x_NTF)
        return nn.functional.cross_entropy(logits_NTC.transpose(1, 2), labels_NT, reduction="none")

    def optimizer(self, config: FitConfig) -> torch.optim.Optimizer:
        """Builds the optimiser; it is elementwise, so N networks do not touch each other."""
        return make_optimizer(self.parameters, config, fused=False)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], step: int) -> None:
        """Loads the result of `optimizer_tensors` at a step."""
        for name, parameter in zip(self._names, self.parameters, strict=True):
            _load(optimizer, parameter, _of(tensors, name), step)

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Returns moments and the like, named `KEY/PARAMETER`, with a leading dimension N."""
        pairs = zip(self._names, self.parameters, strict=True)
        return {f"{key}/{name}": value for name, p in pairs for key, value in _tensors(optimizer, p).items()}

    def buffers(self) -> list[Tensor]:
        """Returns copies of running statistics."""
        return [self._state_N[name].clone() for name, _ in self._module.named_buffers()]

    def restore_buffers(self, kept: list[Tensor]) -> None:
        """Restores running statistics."""
        for (name, _), before in zip(self._module.named_buffers(), kept, strict=True):
            self._state_N[name].copy_(before)

    def snapshot(self) -> dict[str, Tensor]:
        """Returns a copy of the `state_dict`, its tensors with a leading dimension N."""
        return {name: tensor.detach().clone() for name, tensor in self._state_N.items()}


class Alone:
    """One network in channels-last, the fastest on a CPU where convolutions take most of a step."""

    stacked = False

    def __init__(self, module: nn.Module, start: Mapping[str, Tensor]) -> None:
        self._module = copy.deepcopy(module)
        self._module.load_state_dict(dict(start))
        self._module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._names = [name for name, _ in self._module.named_parameters()]
        self.parameters: list[Tensor] = list(self._module.parameters())

    def losses(self, x_NTF: Tensor, labels_NT: Tensor) -> Tensor:
        """Returns the cross-entropy of every sample `(1, T)`."""
        logits_TC = self._module(x_NTF[0])
        return nn.functional.cross_entropy(logits_TC, labels_NT[0], reduction="none").unsqueeze(0)

    def optimizer(self, config: FitConfig) -> torch.optim.Optimizer:
        """Builds the optimiser with one fused kernel in place of a dozen small ones a tensor."""
        return make_optimizer(self.parameters, config, fused=True)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], step: int) -> None:
        """Loads the result of `optimizer_tensors` at a step."""
        for name, parameter in zip(self._names, self.parameters, strict=True):
            _load(optimizer, parameter, {key: value[0] for key, value in _of(tensors, name).items()}, step)

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Returns moments and the like, named `KEY/PARAMETER`, with a leading dimension 1."""
        pairs = zip(self._names, self.parameters, strict=True)
        return {f"{key}/{name}": _plain(value) for name, p in pairs for key, value in _tensors(optimizer, p).items()}

    def buffers(self) -> list[Tensor]:
        """Returns copies of running statistics."""
        return [buffer.clone() for buffer in self._module.buffers()]

    def restore_buffers(self, kept: list[Tensor]) -> None:
        """Restores running statistics."""
        for buffer, before in zip(self._module.buffers(), kept, strict=True):
            buffer.copy_(before)

    def snapshot(self) -> dict[str, Tensor]:
        """Returns a copy of the `state_dict`, its tensors with a leading dimension 1."""
        return {name: _plain(tensor) for name, tensor in self._module.state_dict().items()}


def make_optimizer(parameters: list[Tensor], config: FitConfig, *, fused: bool) -> torch.optim.Optimizer:
    """Builds torch's own optimiser by the config."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=decay, fused=fused)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, lr=rate, weight_decay=decay, fused=fused)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).unsqueeze(0)


def _of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.partition("/")[0]: value for key, value in tensors.items() if key.partition("/")[2] == name}


def _tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    return {key: value.detach().clone() for key, value in state.items() if key != "step" and value is not None}


def _load(optimizer: torch.optim.Optimizer, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> None:
    if not tensors:
        return
    state = {key: torch.empty_like(parameter).copy_(value) for key, value in tensors.items()}
    if not isinstance(optimizer, torch.optim.SGD):
        state["step"] = torch.tensor(float(step))
    optimizer.state[parameter] = state
