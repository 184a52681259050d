"""Engines, which take the optimiser steps: plain torch in this process, or DeepSpeed over all workers.

Both train the same stage. `optimizer_state` gives the optimiser's state by parameter name in full, whatever the
sharding, so that a checkpoint can be resumed by another number of workers, another ZeRO stage, or without DeepSpeed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.compat import link_optimizer_state, skip_shared_memory_collectives
from raywgen.generators import Stage, StageLoss
from raywgen.nn.precision import Precision, autocast, resolved
from raywgen.weights import KeyedNoise, WeightBatch

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"


def _optimizer(stage: Stage) -> torch.optim.Optimizer:
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


class Engine(ABC):
    """Takes the optimiser steps of one stage, and keeps the moving average of its parameters if it asks for one.

    Args:
        stage: The stage to train, on its device.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._averages: dict[str, Tensor] = {}
        if stage.config.optimizer.ema_decay:
            self._averages = {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}

    def train_step(self, batch: WeightBatch, noise: KeyedNoise, learning_rate: float) -> dict[str, Tensor]:
        """Takes one optimiser step on this worker's part of a batch; returns metrics averaged over all workers."""
        self.stage.train()
        parts = _parts(len(batch.sample_index_B), self.stage.config.optimizer.accumulation)
        metrics: dict[str, Tensor] = {}
        for number, index_N in enumerate(parts):
            if len(parts) == 1:
                result, share = self._forward(batch, noise), 1.0
            else:
                result = self._forward(batch.take(index_N), noise.take(index_N))
                share = len(index_N) / len(batch.sample_index_B)
            self._backward(result.loss, share, is_first=number == 0)
            for name, value in _detached(result).items():
                metrics[name] = value if len(parts) == 1 else metrics.get(name, 0.0) + share * value
        self._step(learning_rate)
        self.stage.after_step(self.all_reduce)
        self._update_averages()
        return self._mean(metrics)

    @torch.no_grad()
    def evaluate(self, batch: WeightBatch, noise: KeyedNoise) -> dict[str, Tensor]:
        """Returns metrics of a batch, averaged over all workers, and learns nothing from it."""
        self.stage.eval()
        with self._averaged_parameters():
            return self._mean(_detached(self._forward(batch, noise)))

    def averages(self) -> dict[str, Tensor]:
        """Returns the moving averages of the parameters by name, on the CPU; nothing if the stage asks for none."""
        return {name: average.cpu().clone() for name, average in self._averages.items()}

    def set_averages(self, averages: Mapping[str, Tensor]) -> None:
        """Loads what `averages` returned."""
        for name, average in self._averages.items():
            average.copy_(averages[name])

    @torch.no_grad()
    def finish(self) -> None:
        """Gives the parameters their moving averages, at the end of the stage."""
        load_averages(self.stage, self._averages)

    @torch.no_grad()
    def _update_averages(self) -> None:
        if not self._averages:
            return
        for name, parameter in self.stage.named_parameters():
            self._averages[name].lerp_(parameter, 1 - self.stage.config.optimizer.ema_decay)

    @contextmanager
    def _averaged_parameters(self) -> Iterator[None]:
        """The parameters have the values of their averages within this block."""
        if not self._averages:
            yield
            return
        own = {name: parameter.detach().clone() for name, parameter in self.stage.named_parameters()}
        load_averages(self.stage, self._averages)
        try:
            yield
        finally:
            load_averages(self.stage, own)

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums over all workers, in place."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker; every worker must call it and gets the same answer."""
        return flag

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Returns the optimiser's state by parameter name, in full, on the CPU; every worker must call it."""

    @abstractmethod
    def set_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `optimizer_state` returned, in whatever sharding this engine has."""

    @abstractmethod
    def _forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss: ...

    @abstractmethod
    def _backward(self, loss: Tensor, share: float, *, is_first: bool) -> None:
        """Adds the gradient of a part of the batch, which is a share of all; the first part begins anew."""

    @abstractmethod
    def _step(self, learning_rate: float) -> None: ...

    @property
    @abstractmethod
    def _num_workers(self) -> int: ...

    def _mean(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = self.all_reduce(torch.stack(list(metrics.values())).float()) / self._num_workers
        return dict(zip(metrics, mean.unbind(), strict=True))


class LocalEngine(Engine):
    """Trains in one process with plain torch.

    Args:
        stage: The stage to train.
        precision: One of the names in `raywgen.nn.precision`.
    """

    def __init__(self, stage: Stage, precision: Precision = "fp32") -> None:
        super().__init__(stage)
        self._device_type = next(stage.parameters()).device.type
        self._precision = resolved(precision, self._device_type)
        self._optimizer = _optimizer(stage)

    @property
    def _num_workers(self) -> int:
        return 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Returns the tensor: there is no other worker."""
        return tensor

    def optimizer_state(self) -> dict[str, Tensor]:
        """Returns the state of torch's optimiser."""
        return _torch_state(self.stage, self._optimizer)

    def set_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Loads the state into torch's optimiser."""
        _set_torch_state(self.stage, self._optimizer, state)

    def _forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        with autocast(self._precision, self._device_type):
            return self.stage(batch, noise)

    def _backward(self, loss: Tensor, share: float, *, is_first: bool) -> None:
        if is_first:
            self._optimizer.zero_grad()
        (loss if share == 1 else loss * share).backward()

    def _step(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        nn.utils.clip_grad_norm_(self.stage.parameters(), self.stage.config.optimizer.grad_clip)
        self._optimizer.step()


class DeepSpeedEngine(Engine):
    """Trains on all Ray Train workers with DeepSpeed ZeRO 0, 1 or 2.

    Args:
        stage: The stage to train.
        zero_stage: 0 shards nothing, 1 the optimiser state, 2 gradients too.
        num_workers: Size of the process group that Ray Train made.
        precision: One of the names in `raywgen.nn.precision`; parameters, gradients and optimiser state stay float32.
    """

    def __init__(self, stage: Stage, zero_stage: int, num_workers: int, precision: Precision = "fp32") -> None:
        import deepspeed

        skip_shared_memory_collectives()
        super().__init__(stage)
        self._zero_stage = zero_stage
        self._workers = num_workers
        self._optimizer = _optimizer(stage)
        accumulation = stage.config.optimizer.accumulation
        self._engine: Any = deepspeed.initialize(
            model=stage,
            optimizer=self._optimizer,  # pyright: ignore[reportArgumentType]
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": max(1, stage.config.batch_size // num_workers // accumulation),
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": stage.config.optimizer.grad_clip,
                "zero_optimization": {"stage": zero_stage},
                "zero_allow_untested_optimizer": True,
                "torch_autocast": {
                    "enabled": resolved(precision, next(stage.parameters()).device.type) == "bf16",
                    "dtype": "bfloat16",
                    # Gradients are exchanged in float32, so that any number of workers takes the same steps.
                    "lower_precision_safe_modules": [],
                },
                "steps_per_print": 1_000_000_000,
            },
        )[0]

    @property
    def _num_workers(self) -> int:
        return self._workers

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums with the process group's own backend."""
        torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Sums the flags of all workers."""
        device = next(self.stage.parameters()).device
        return bool(self.all_reduce(torch.tensor(float(flag), device=device)) > 0)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Gathers all workers' shards."""
        if self._zero_stage == 0 or not _has_moments(self.stage):
            return _torch_state(self.stage, self._optimizer)
        from deepspeed.utils import safe_get_full_optimizer_state

        full: dict[str, Tensor] = {}
        for name, parameter in self.stage.named_parameters():
            for key in _MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, key)
                assert moment is not None, f"DeepSpeed keeps no {key} of {name}"
                full[f"{name}|{key}"] = moment.detach().cpu().clone()
        return full | {_STEP: next(self._steps()).detach().cpu().clone()}

    def set_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Gives each worker its own shard."""
        if self._zero_stage == 0 or not _has_moments(self.stage):
            _set_torch_state(self.stage, self._optimizer, state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        # Before its first step Adam has no state, and DeepSpeed no link from parameters to their shards of it.
        for group in self._optimizer.param_groups:
            for shard in group["params"]:
                self._optimizer.state[shard] = {key: torch.zeros_like(shard) for key in _MOMENTS}
                self._optimizer.state[shard][_STEP] = torch.tensor(0.0)
        link_optimizer_state(self._engine)
        for name, parameter in self.stage.named_parameters():
            for key in _MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}|{key}"], key)
        for step in self._steps():
            step.copy_(state[_STEP])

    def _steps(self) -> Iterator[Tensor]:
        for state in self._optimizer.state.values():
            if _STEP in state:
                yield state[_STEP]

    def _forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        return self._engine(batch, noise)

    def _backward(self, loss: Tensor, share: float, *, is_first: bool) -> None:
        if not is_first:
            self._engine.step()  # It only counts the parts until the last one.
        # DeepSpeed divides each part's loss by their number.
        scale = share * self.stage.config.optimizer.accumulation
        self._engine.backward(loss if scale == 1 else loss * scale)

    def _step(self, learning_rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()


@torch.no_grad()
def load_averages(stage: Stage, averages: Mapping[str, Tensor]) -> None:
    """Gives parameters of a stage new values by name; those that are not named keep theirs."""
    for name, parameter in stage.named_parameters():
        if name in averages:
            parameter.copy_(averages[name])


def _parts(num: int, accumulation: int) -> list[Tensor]:
    """Indices of the parts of a worker's share of a batch."""
    assert num >= accumulation, f"{num} networks do not make {accumulation} parts"
    return list(torch.arange(num).tensor_split(accumulation))


def _detached(result: StageLoss) -> dict[str, Tensor]:
    return {"loss": result.loss.detach(), **result.metrics}


def _has_moments(stage: Stage) -> bool:
    return stage.config.optimizer.kind == "adamw"


def _torch_state(stage: Stage, adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    full: dict[str, Tensor] = {}
    if not _has_moments(stage):
        return full
    for name, parameter in stage.named_parameters():
        state = adam.state[parameter]
        for key in _MOMENTS:
            value = state.get(key, torch.zeros_like(parameter))
            full[f"{name}|{key}"] = value.detach().cpu().clone()
        # A parameter that no loss has reached yet has no state, and would set the others back.
        if _STEP in state:
            full[_STEP] = torch.as_tensor(state[_STEP]).detach().cpu().clone()
    return {_STEP: torch.zeros(()), **full}


def _set_torch_state(stage: Stage, adam: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    if not _has_moments(stage):
        return
    for name, parameter in stage.named_parameters():
        moments = {key: state[f"{name}|{key}"].to(parameter.device).clone() for key in _MOMENTS}
        adam.state[parameter] = {**moments, _STEP: state[_STEP].clone()}
