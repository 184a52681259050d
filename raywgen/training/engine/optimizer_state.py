"""The optimiser of a stage, and what of it and of a module goes to a checkpoint and comes back, by ranges of values."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from raywgen.generators import Stage
from raywgen.training.checkpoints.slices import Part

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class Stored(Protocol):
    """The tensors of a checkpoint, which are read by ranges of their flat values."""

    def __contains__(self, name: str, /) -> bool:
        """Whether there is a tensor of this name."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns the values `[start, stop)` of a flat tensor; by default all."""
        ...


def new_optimizer(stage: Stage) -> torch.optim.Optimizer:
    """Returns the optimiser that a stage's config asks for."""
    config = stage.config.optimizer
    if config.kind == "sgd":
        return torch.optim.SGD(stage.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        stage.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


def has_moments(stage: Stage) -> bool:
    """Whether the stage's optimiser has any state."""
    return stage.config.optimizer.kind == "adamw"


def optimizer_state(stage: Stage, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
    """Returns the state of an optimiser of whole parameters, by name."""
    if not has_moments(stage):
        return {}
    full: dict[str, Part] = {}
    newest = torch.zeros(())
    for name, parameter in stage.named_parameters():
        state = optimizer.state[parameter]
        for key in MOMENTS:
            full[f"{name}|{key}"] = state.get(key, torch.zeros_like(parameter))
        # A parameter that no loss has reached yet has no state, and would set the others back.
        newest = torch.as_tensor(state.get(STEP, newest))
    return {STEP: newest, **full}


def load_optimizer_state(stage: Stage, optimizer: torch.optim.Optimizer, stored: Stored) -> None:
    """Loads what `optimizer_state` returned."""
    for name, parameter in stage.named_parameters():
        moments = {key: torch.empty_like(parameter, memory_format=torch.contiguous_format) for key in MOMENTS}
        for key, moment in moments.items():
            load_range(moment, stored, f"optimizer.{name}|{key}", (0, moment.numel()))
        optimizer.state[parameter] = {**moments, STEP: stored.read(f"optimizer.{STEP}").view(())}


@torch.no_grad()
def load_range(target: Tensor, stored: Stored, name: str, span: tuple[int, int]) -> None:
    """Reads values of a flat stored tensor into the beginning of a tensor; what is beyond, as padding, becomes 0."""
    start, stop = span
    values = stored.read(name, start, stop)
    if target.numel() == len(values):
        target.copy_(values.view(target.shape))
        return
    flat = target.view(-1)
    flat[: len(values)] = values.to(flat.device)
    flat[len(values) :] = 0


@torch.no_grad()
def load_parameters(module: nn.Module, stored: Stored, prefix: str) -> None:
    """Loads the parameters and buffers of a module that lie in a checkpoint under a prefix."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        load_range(tensor, stored, prefix + name, (0, tensor.numel()))
