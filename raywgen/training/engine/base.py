"""The interface of engines, and what they have in common."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raywgen.generators import Stage, StageLoss
from raywgen.nn.blocks import compile_error, prepare_blocks
from raywgen.nn.precision import Precision
from raywgen.weights import KeyedNoise, WeightBatch

Offload = Literal["none", "optimizer", "parameters"]
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The settings of an engine; none of them changes what a stage learns, but for rounding.

    Attributes:
        precision: Precision of matrix products; parameters, gradients and the optimiser's state stay float32.
        accumulate: Parts in which each worker takes its share of a batch, one after another, to save memory.
        zero_stage: 0 shards nothing, 1 the optimiser's state, 2 gradients too, 3 parameters too.
        offload: Keeps the optimiser's state, or parameters too, in the host's memory, where the optimiser then runs.
        activation_checkpointing: Computes the activations of blocks again in the backward pass, in place of keeping
            them.
        compile: Compiles the blocks of networks.
        min_sharded: ZeRO-3 keeps parameters of fewer values whole on every worker.
    """

    precision: Precision = "fp32"
    accumulate: int = 1
    zero_stage: int = 1
    offload: Offload = "none"
    activation_checkpointing: bool = False
    compile: bool = False
    min_sharded: int = 100_000


class DeviceMemoryError(RuntimeError):
    """A device has run out of memory; the message says what to lower."""


class Engine(ABC):
    """Takes the optimiser steps of one stage, and keeps the moving average of its parameters if it asks for one.

    Whatever is whole in the answer of a method is whole on the first worker alone, unless the method says otherwise;
    every worker must call it.

    Args:
        stage: The stage to train, on its device.
        settings: Settings of the engine.
    """

    rank, num_workers = 0, 1

    def __init__(self, stage: Stage, settings: EngineSettings) -> None:
        self.stage = stage
        self.settings = settings
        prepare_blocks(stage, recompute=settings.activation_checkpointing, compiled=self._can_compile())
        self._averages: dict[str, Tensor] = {}

    def train_step(
        self, batch: WeightBatch, noise: KeyedNoise, learning_rate: float, total: int | None = None
    ) -> dict[str, Tensor]:
        """Takes one optimiser step.

        Args:
            batch: This worker's part of a batch.
            noise: Keyed noise of these networks.
            learning_rate: The rate of this step.
            total: Networks of the whole batch; by default every worker's part is as large as this one's.

        Returns:
            Metrics, averaged over the networks of all workers.

        Raises:
            DeviceMemoryError: A part of the batch does not fit into memory.
        """
        with self._memory_explained(len(batch.sample_index_B)):
            return self._train_step(batch, noise, learning_rate, total)

    def _train_step(
        self, batch: WeightBatch, noise: KeyedNoise, learning_rate: float, total: int | None
    ) -> dict[str, Tensor]:
        self.stage.train()
        weight, metrics = self._weight(batch, total), {}
        parts = _parts(len(batch.sample_index_B), self.settings.accumulate)
        for number, index_N in enumerate(parts):
            with self._gathered(), self._exchange(is_last=number + 1 == len(parts)):
                if len(parts) == 1:
                    result, share = self._forward(batch, noise), weight
                else:
                    result = self._forward(batch.take(index_N), noise.take(index_N))
                    share = weight * len(index_N) / len(batch.sample_index_B)
                self._backward(result.loss, share, is_first=number == 0)
            for name, value in _detached(result).items():
                metrics[name] = value if weight == len(parts) == 1 else metrics.get(name, 0.0) + share * value
        self._step(learning_rate)
        self.stage.after_step(self.all_reduce)
        self._update_averages()
        return self._mean(metrics)

    @torch.no_grad()
    def evaluate(self, batch: WeightBatch, noise: KeyedNoise, total: int | None = None) -> dict[str, Tensor]:
        """Returns metrics of a batch, averaged over all workers, and learns nothing from it; see `train_step`."""
        self.stage.eval()
        weight = self._weight(batch, total)
        with self._averaged_parameters(), self._gathered():
            metrics = _detached(self._forward(batch, noise))
        return self._mean({name: value if weight == 1 else weight * value for name, value in metrics.items()})

    # What an engine gives and takes

    @torch.no_grad()
    def state_dict(self, module: nn.Module, *, everywhere: bool = False) -> dict[str, Tensor]:
        """Returns parameters and buffers in full, on the CPU.

        Args:
            module: The stage, or a generator that shares parameters with it.
            everywhere: Whether each worker gets them, and not the first one alone.
        """
        state = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            whole = self._whole(self._held(tensor), tensor)
            if everywhere or self.rank == 0:
                state[name] = whole.detach().cpu().clone()
        return state

    @torch.no_grad()
    def averages(self) -> dict[str, Tensor]:
        """Returns the moving averages of the parameters by name, on the CPU; nothing if the stage asks for none."""
        return self._whole_on_first(self._averages)

    @torch.no_grad()
    def set_averages(self, averages: Mapping[str, Tensor]) -> None:
        """Loads what `averages` returned, on every worker."""
        parameters = dict(self.stage.named_parameters())
        for name, average in self._averages.items():
            average.copy_(self._part(averages[name], parameters[name]))

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Returns the optimiser's state by parameter name, in full, on the CPU."""

    @abstractmethod
    def set_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `optimizer_state` returned, on every worker, in whatever sharding this engine has."""

    @torch.no_grad()
    def finish(self) -> None:
        """Gives the parameters their moving averages, at the end of the stage."""
        self._load_held(self._averages)

    def close(self) -> None:  # noqa: B027 (most engines hold nothing beyond themselves)
        """Lets go of the stage and of the optimiser's state, when no step is to follow."""

    # What engines share

    @contextmanager
    def _memory_explained(self, num_networks: int) -> Iterator[None]:
        """Says what to lower where memory runs out within this block."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error) else ""
            is_full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason
            if not is_full:
                raise
            parts, remedies = self.settings.accumulate, ["a higher zero_stage over more workers, or strategy=auto"]
            if not self.settings.activation_checkpointing and self.stage.parameter_use != "functional":
                remedies.insert(0, "activation_checkpointing=true")
            if parts < num_networks:
                remedies.insert(0, f"accumulate={min(2 * parts, num_networks)} (now {parts})")
            raise DeviceMemoryError(
                f"stage '{self.stage.name}' has no memory left with {-(-num_networks // parts)} networks at a time: "
                f"give {', '.join(remedies)} ({reason})"
            ) from error

    def _can_compile(self) -> bool:
        """Whether blocks shall be compiled and can be; says so where they cannot."""
        if not self.settings.compile:
            return False
        device = next(self.stage.parameters()).device
        if reason := compile_error(device):
            warnings.warn(
                f"compile=true has no effect: nothing compiles for {device.type} here ({reason})", stacklevel=2
            )
        return not reason

    @torch.no_grad()
    def _start_averages(self) -> None:
        """Begins the averages; a subclass calls it once its parameters are where they stay."""
        if self.stage.config.optimizer.ema_decay:
            self._averages = {name: self._held(p).detach().float().clone() for name, p in self.stage.named_parameters()}

    @torch.no_grad()
    def _update_averages(self) -> None:
        if not self._averages:
            return
        for name, parameter in self.stage.named_parameters():
            self._averages[name].lerp_(self._held(parameter).detach(), 1 - self.stage.config.optimizer.ema_decay)

    @contextmanager
    def _averaged_parameters(self) -> Iterator[None]:
        """The parameters have the values of their averages within this block."""
        if not self._averages:
            yield
            return
        own = {name: self._held(parameter).detach().clone() for name, parameter in self.stage.named_parameters()}
        self._load_held(self._averages)
        try:
            yield
        finally:
            self._load_held(own)

    def _load_held(self, parts: Mapping[str, Tensor]) -> None:
        for name, parameter in self.stage.named_parameters():
            if name in parts:
                self._held(parameter).copy_(parts[name])

    def _whole_on_first(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts the workers' parts of something that each parameter has together, one after another."""
        whole = {}
        for name, parameter in self.stage.named_parameters():
            if name in parts:
                tensor = self._whole(parts[name], parameter)
                if self.rank == 0:
                    whole[name] = tensor.detach().cpu().clone()
        return whole

    def _held(self, parameter: Tensor) -> Tensor:
        """Returns the part of a parameter that this worker holds: all of it, unless parameters are sharded."""
        return parameter

    def _whole(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Returns in full what the workers hold parts of, as they hold parts of a parameter."""
        return part

    def _part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Applies the inverse of `_whole`."""
        return whole

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker; every worker must call it and gets the same answer."""
        if self.num_workers == 1:
            return flag
        device = next(self.stage.parameters()).device
        return bool(self.all_reduce(torch.tensor(float(flag), device=device)) > 0)

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums over all workers, in place."""

    def _gathered(self) -> AbstractContextManager[None]:
        """Wraps forward and backward, where an engine has to make parameters whole for them."""
        return nullcontext()

    def _exchange(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Wraps forward and backward of a part of a batch, where gradients are exchanged after the last part alone."""
        return nullcontext()

    @abstractmethod
    def _forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss: ...

    @abstractmethod
    def _backward(self, loss: Tensor, share: float, *, is_first: bool) -> None:
        """Adds the gradient of a part of the batch, which is a share of all; the first part begins anew."""

    @abstractmethod
    def _step(self, learning_rate: float) -> None: ...

    def _weight(self, batch: WeightBatch, total: int | None) -> float:
        """Returns what this worker's part counts for where the workers' parts would count for 1 if they were equal."""
        return 1.0 if total is None else len(batch.sample_index_B) * self.num_workers / total

    def _mean(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = self.all_reduce(torch.stack(list(metrics.values())).float()) / self.num_workers
        return dict(zip(metrics, mean.unbind(), strict=True))


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


def optimizer_state(stage: Stage, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the state of an optimiser of whole parameters, by name, on the CPU."""
    full: dict[str, Tensor] = {}
    if not has_moments(stage):
        return full
    for name, parameter in stage.named_parameters():
        state = optimizer.state[parameter]
        for key in MOMENTS:
            value = state.get(key, torch.zeros_like(parameter))
            full[f"{name}|{key}"] = value.detach().cpu().clone()
        # A parameter that no loss has reached yet has no state, and would set the others back.
        if STEP in state:
            full[STEP] = torch.as_tensor(state[STEP]).detach().cpu().clone()
    return {STEP: torch.zeros(()), **full}


def set_optimizer_state(stage: Stage, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Loads what `optimizer_state` returned."""
    if not has_moments(stage):
        return
    for name, parameter in stage.named_parameters():
        moments = {key: state[f"{name}|{key}"].to(parameter.device).clone() for key in MOMENTS}
        optimizer.state[parameter] = {**moments, STEP: state[STEP].clone()}


@torch.no_grad()
def load_averages(stage: Stage, averages: Mapping[str, Tensor]) -> None:
    """Gives parameters of a stage new values by name; those that are not named keep theirs."""
    for name, parameter in stage.named_parameters():
        if name in averages:
            parameter.copy_(averages[name])


def _parts(num: int, num_parts: int) -> list[Tensor]:
    """Indices of the parts of a worker's share of a batch."""
    assert num >= num_parts, f"{num} networks do not make {num_parts} parts"
    return list(torch.arange(num).tensor_split(num_parts))


def _detached(result: StageLoss) -> dict[str, Tensor]:
    return {"loss": result.loss.detach(), **result.metrics}
