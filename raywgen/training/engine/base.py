"""The interface of engines, and what they have in common."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raywgen.generators import Stage, StageLoss
from raywgen.nn.blocks import compile_error, prepare_blocks
from raywgen.nn.precision import Precision
from raywgen.training.checkpoints.slices import Part
from raywgen.training.engine.optimizer_state import STEP, Stored, load_range
from raywgen.weights import KeyedNoise, WeightBatch

Offload = Literal["none", "optimizer", "parameters"]
MAX_BUCKET = 10_000_000
"""The most values that DeepSpeed exchanges at once, in buffers that it keeps beside the states."""


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

    Args:
        stage: The stage to train, on its device.
        settings: Settings of the engine.
    """

    rank, num_workers = 0, 1
    is_flagged = False
    """Whether some worker had a flag set at the last step."""

    def __init__(self, stage: Stage, settings: EngineSettings) -> None:
        self.stage = stage
        self.settings = settings
        prepare_blocks(stage, recompute=settings.activation_checkpointing, compiled=self._can_compile())
        self._averages: dict[str, Tensor] = {}
        self._is_training: bool | None = None

    def train_step(
        self,
        batch: WeightBatch,
        noise: KeyedNoise,
        learning_rate: float,
        total: int | None = None,
        has_flag: Callable[[], bool] = bool,
    ) -> dict[str, Tensor]:
        """Takes one optimiser step.

        Args:
            batch: This worker's part of a batch.
            noise: Keyed noise of these networks.
            learning_rate: The rate of this step.
            total: Networks of the whole batch; by default every worker's part is as large as this one's.
            has_flag: Whether this worker sets its flag, asked after the backward pass; `is_flagged` then says on every
                worker whether any has.

        Returns:
            Metrics, averaged over the networks of all workers.

        Raises:
            DeviceMemoryError: A part of the batch does not fit into memory.
        """
        with self._memory_explained(len(batch.sample_index_B)):
            return self._train_step(batch, noise, learning_rate, total, has_flag)

    def _train_step(
        self,
        batch: WeightBatch,
        noise: KeyedNoise,
        learning_rate: float,
        total: int | None,
        has_flag: Callable[[], bool],
    ) -> dict[str, Tensor]:
        self._set_mode(is_training=True)
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
        # The workers exchange metrics while the optimiser works.
        flag = torch.full_like(metrics["loss"], float(has_flag()))
        sums = self.begin_all_reduce(_stacked({**metrics, "flag": flag}))
        self._step(learning_rate)
        self.stage.after_step(self.all_reduce)
        self._update_averages()
        *means, mean_flag = (sums() / self.num_workers).unbind()
        self.is_flagged = bool(mean_flag > 0)
        return dict(zip(metrics, means, strict=True))

    def evaluate(self, batch: WeightBatch, noise: KeyedNoise, total: int | None = None) -> dict[str, Tensor]:
        """Returns metrics of a batch, averaged over all workers, and learns nothing from it; see `train_step`."""
        count = len(batch.sample_index_B)
        return self.evaluate_parts([(batch, noise, count)], total or count * self.num_workers)

    @torch.no_grad()
    def evaluate_parts(self, parts: Iterable[tuple[WeightBatch, KeyedNoise, int]], total: int) -> dict[str, Tensor]:
        """Returns metrics, averaged over the networks of all parts and workers, and learns nothing.

        Args:
            parts: Parts of this worker's share, with their noise and the number of networks that they count for; as
                many as every other worker has.
            total: Networks of all workers.
        """
        self._set_mode(is_training=False)
        metrics: dict[str, Tensor] = {}
        with self._averaged_parameters():
            for batch, noise, count in parts:
                with self._gathered():
                    found = _detached(self._forward(batch, noise))
                weight = count * self.num_workers / total
                for name, value in found.items():
                    metrics[name] = metrics[name] + weight * value if name in metrics else weight * value
        return self._mean(metrics)

    # What an engine gives to a checkpoint and takes from one

    @torch.no_grad()
    def state(self, generator: nn.Module) -> dict[str, Part]:
        """Returns all that a run needs to go on, as this worker holds it; every worker must call it.

        The tensors are those that training goes on with; they change with the next step.

        Args:
            generator: The generator, which shares parameters with the stage; its state stands under `model.`, the
                optimiser's under `optimizer.`, the parameters' averages under `ema.`, the stage's own under `stage.`.
        """
        found = self.parameters_of(generator)
        found |= {f"optimizer.{name}": part for name, part in self._optimizer_state().items()}
        for name, parameter in self.stage.named_parameters():
            if name in self._averages:
                found[f"ema.{name}"] = self._part(self._averages[name], parameter)
        return found | {f"stage.{name}": tensor for name, tensor in self.stage.state(self.all_reduce).items()}

    @torch.no_grad()
    def parameters_of(self, generator: nn.Module) -> dict[str, Part]:
        """Returns the parameters and buffers of a generator under `model.`, as this worker holds them."""
        tensors = generator.state_dict(keep_vars=True)
        return {f"model.{name}": self._part(self._held(tensor), tensor) for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, stored: Stored) -> None:
        """Loads the optimiser's state and the averages that a checkpoint holds: the values that this worker needs."""
        if f"optimizer.{STEP}" in stored:
            self._load_optimizer_state(stored)
        for name, parameter in self.stage.named_parameters():
            if name in self._averages and f"ema.{name}" in stored:
                load_range(self._averages[name], stored, f"ema.{name}", self._range(parameter))

    @abstractmethod
    def _optimizer_state(self) -> dict[str, Part]:
        """Returns the optimiser's state by parameter name, as this worker holds it."""

    @abstractmethod
    def _load_optimizer_state(self, stored: Stored) -> None:
        """Loads what `_optimizer_state` returned on all workers, in whatever sharding this engine has."""

    @torch.no_grad()
    def finish(self) -> None:
        """Gives the parameters their moving averages, at the end of the stage."""
        self._load_held(self._averages)

    def close(self) -> None:  # noqa: B027 (most engines hold nothing beyond themselves)
        """Lets go of the stage and of the optimiser's state, when no step is to follow."""

    # What engines share

    def _set_mode(self, *, is_training: bool) -> None:
        """Sets the mode of the stage where it changes: a walk through all modules in every step takes its time."""
        if self._is_training != is_training:
            self._is_training = is_training
            self.stage.train(is_training)

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

    def _held(self, parameter: Tensor) -> Tensor:
        """Returns the part of a parameter that this worker holds: all of it, unless parameters are sharded."""
        return parameter

    def _part(self, held: Tensor, parameter: Tensor) -> Part:
        """Returns what a worker holds of a tensor of a parameter's shape, in its place in the whole."""
        return held

    def _range(self, parameter: Tensor) -> tuple[int, int]:
        """Returns the first value and the end of what this worker holds of a flat parameter."""
        return 0, parameter.numel()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker; every worker must call it and gets the same answer."""
        if self.num_workers == 1:
            return flag
        device = next(self.stage.parameters()).device
        return bool(self.all_reduce(torch.tensor(float(flag), device=device)) > 0)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums over all workers, in place."""
        return self.begin_all_reduce(tensor)()

    def begin_all_reduce(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begins to sum over all workers, in place; returns a function that waits for the sum and returns it."""
        if self.num_workers == 1:
            return lambda: tensor
        work: Any = torch.distributed.all_reduce(tensor, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait

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
        mean = self.all_reduce(_stacked(metrics)) / self.num_workers
        return dict(zip(metrics, mean.unbind(), strict=True))


def _parts(num: int, num_parts: int) -> list[Tensor]:
    """Indices of the parts of a worker's share of a batch."""
    assert num >= num_parts, f"{num} networks do not make {num_parts} parts"
    return list(torch.arange(num).tensor_split(num_parts))


def _stacked(numbers: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(numbers.values())).float()


def _detached(result: StageLoss) -> dict[str, Tensor]:
    return {"loss": result.loss.detach(), **result.metrics}
