"""The choice of a parallel strategy from the sizes of a stage and the memory of its workers.

Bytes of a worker, of P parameters over W workers (Rajbhandari et al. 2020, "ZeRO", section 3, with all in float32):

    ZeRO-0    4 P parameters + 4 P gradients + 8 P moments
    ZeRO-1    4 P + 4 P + 12 P / W      the optimiser has a copy of its shard of the parameters
    ZeRO-2    4 P + 4 P / W + 12 P / W
    ZeRO-3    4 P / W + 4 P / W + 12 P / W, and 4 P while a stage must have all parameters at once

Offloading takes the optimiser's part out of the device's memory, or the parameters' too. Averages of the parameters
take as much as the parameters. What is left holds the activations of one part of a worker's share of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from raywgen.config import ConfigError
from raywgen.generators import Stage
from raywgen.nn.blocks import prepare_blocks
from raywgen.nn.memory import gib
from raywgen.training.engine import MAX_BUCKET, EngineSettings, Offload
from raywgen.weights import KeyedNoise, WeightBatch

_USABLE = 0.85
# In order of what they cost in communication and time; each needs less memory than the one before.
_CHOICES: tuple[tuple[int, Offload], ...] = (
    (0, "none"),
    (1, "none"),
    (2, "none"),
    (3, "none"),
    (2, "optimizer"),
    (3, "optimizer"),
    (3, "parameters"),
)
# DeepSpeed's own default: the parameters that ZeRO-3 keeps gathered.
_LIVE = 1_000_000_000
# More parts than that cost more than sharding does.
_FEW_PARTS = 4


class DoesNotFitError(ConfigError):
    """A stage does not fit into the memory of the workers, which no new try would change."""


class StrategyError(DoesNotFitError):
    """A stage fits under no strategy; the message says what it would need."""


@dataclass(frozen=True, kw_only=True)
class StageSizes:
    """The sizes of a stage that decide how it is trained.

    Attributes:
        num_parameters: P.
        num_largest: Values of the largest parameter.
        activation_bytes: Bytes that the backward pass of one network needs.
        batch_size: Networks of a batch, over all workers.
        has_averages: Whether averages of the parameters are kept.
        has_moments: Whether the optimiser keeps two moments of each parameter, and not just the parameters.
        gathers_all: Whether the stage needs all its parameters at once.
    """

    num_parameters: int
    activation_bytes: int
    batch_size: int
    num_largest: int = 0
    has_averages: bool = False
    has_moments: bool = True
    gathers_all: bool = False

    @classmethod
    def measure(cls, stage: Stage, examples: Iterable[tuple[WeightBatch, KeyedNoise]]) -> StageSizes:
        """Measures a stage by forward passes, which learn nothing, of batches of one network with their noise."""
        sizes = cls.of_states(stage)
        # Inner steps have changed copies of the parameters, and their gradients, for every network.
        copies = 8 * sizes.num_parameters if stage.parameter_use == "functional" else 0
        activations = max(_saved_bytes(stage, batch, noise) for batch, noise in examples)
        return replace(sizes, activation_bytes=copies + activations)

    @classmethod
    def of_states(cls, stage: Stage, activation_bytes: int = 0) -> StageSizes:
        """Returns what is known of a stage without running it."""
        return cls(
            num_parameters=sum(parameter.numel() for parameter in stage.parameters()),
            num_largest=max((parameter.numel() for parameter in stage.parameters()), default=0),
            activation_bytes=activation_bytes,
            batch_size=stage.config.batch_size,
            has_averages=stage.config.optimizer.ema_decay > 0,
            has_moments=stage.config.optimizer.kind == "adamw",
            gathers_all=stage.parameter_use != "modules",
        )


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """The way in which a stage is trained.

    Attributes:
        zero_stage: ZeRO stage; of no effect in one process.
        offload: The state that is kept in the host's memory.
        accumulate: Parts of a worker's share of a batch.
        reason: Why, in a sentence.
    """

    zero_stage: int
    offload: Offload
    accumulate: int
    reason: str


def suited_settings(
    settings: EngineSettings,
    stage: Stage,
    examples: Iterable[tuple[WeightBatch, KeyedNoise]],
    num_workers: int,
    memory: int,
    can_offload: bool,
) -> tuple[EngineSettings, str]:
    """Returns the settings under which a stage fits, and a sentence that says which they are and why.

    Args:
        settings: The engine's settings; those that do not concern the strategy stay as they are.
        stage: The stage, before its engine is made.
        examples: Batches of one network, with their noise.
        num_workers: As in `choose_strategy`, which raises where nothing fits.
        memory: Likewise.
        can_offload: Likewise.
    """
    prepare_blocks(stage, recompute=settings.activation_checkpointing, compiled=False)
    sizes = StageSizes.measure(stage, examples)
    max_zero_stage = 2 if settings.compile else 3
    chosen = choose_strategy(sizes, num_workers, memory, can_offload=can_offload, max_zero_stage=max_zero_stage)
    found = {"zero_stage": chosen.zero_stage, "offload": chosen.offload, "accumulate": chosen.accumulate}
    named = ", ".join(f"{name}={value}" for name, value in found.items() if num_workers or name == "accumulate")
    return replace(settings, **found), f"{named}, because {chosen.reason}"


def choose_strategy(
    sizes: StageSizes, num_workers: int, memory: int, *, can_offload: bool, max_zero_stage: int = 3
) -> Strategy:
    """Returns the cheapest strategy under which a stage fits into memory.

    Args:
        sizes: The stage.
        num_workers: Workers; 0 for plain torch in this process.
        memory: Bytes of the device that each worker may use.
        can_offload: Whether the host has other memory than the device.
        max_zero_stage: The largest ZeRO stage that other settings allow.

    Raises:
        StrategyError: Nothing fits.
    """
    share = math.ceil(sizes.batch_size / max(1, num_workers))
    # Every worker takes the same number of parts, and each part needs a network.
    most_parts = sizes.batch_size // max(1, num_workers)
    feasible: list[Strategy] = []
    tried = allowed_choices(num_workers, can_offload=can_offload, max_zero_stage=max_zero_stage)
    for zero_stage, offload in tried:
        state = state_bytes(sizes, max(1, num_workers), zero_stage, offload)
        left = _USABLE * memory - state
        fitting = int(left // max(1, sizes.activation_bytes))
        if fitting < 1:
            continue
        parts = math.ceil(share / fitting)
        if parts > most_parts:
            continue
        reason = (
            f"{_amount(sizes.num_parameters)} parameters take {gib(state)} of {gib(memory)} of a worker, and "
            f"{gib(sizes.activation_bytes)} a network in {parts} {'part' if parts == 1 else 'parts'} of {share}"
        )
        feasible.append(Strategy(zero_stage=zero_stage, offload=offload, accumulate=parts, reason=reason))
    few = [strategy for strategy in feasible if strategy.accumulate <= _FEW_PARTS]
    if chosen := next(iter(few or feasible), None):
        return chosen
    least = min(state_bytes(sizes, max(1, num_workers), *choice) for choice in tried) + sizes.activation_bytes
    raise StrategyError(
        f"{_amount(sizes.num_parameters)} parameters and one network of a batch need {gib(least)} of a worker, which "
        f"has {gib(memory)}: give more workers, a smaller generator, or activation_checkpointing=true"
    )


def allowed_choices(num_workers: int, *, can_offload: bool, max_zero_stage: int = 3) -> list[tuple[int, Offload]]:
    """Returns ZeRO stages with what is offloaded, of which the first that fits is chosen; see `choose_strategy`."""
    choices = [choice for choice in _CHOICES if choice[0] <= max_zero_stage and (can_offload or choice[1] == "none")]
    return choices if num_workers else choices[:1]


def state_bytes(sizes: StageSizes, num_workers: int, zero_stage: int, offload: Offload) -> int:
    """Returns the bytes of a worker's device for parameters, gradients, the optimiser's state and averages."""
    return sum(state_parts(sizes, num_workers, zero_stage, offload))


class StateBytes(NamedTuple):
    """The bytes of what a worker's device holds from step to step."""

    parameters: int
    gradients: int
    optimizer: int
    averages: int
    gathered: int


def state_parts(sizes: StageSizes, num_workers: int, zero_stage: int, offload: Offload) -> StateBytes:
    """Returns the parts of `state_bytes`; those that are offloaded are 0."""
    P, W = sizes.num_parameters, num_workers
    parameters = 4 * P / W if zero_stage == 3 else 4 * P
    gradients = 4 * P / W if zero_stage >= 2 else 4 * P
    moments = 8 if sizes.has_moments else 0
    optimizer = (moments + 4) * P / W if zero_stage else moments * P
    averages = parameters if sizes.has_averages else 0
    gathered = 4 * P if zero_stage == 3 and sizes.gathers_all else 0
    if offload != "none":
        optimizer = 0
    if offload == "parameters":
        parameters = averages = 0
    return StateBytes(int(parameters), int(gradients), int(optimizer), int(averages), int(gathered))


def buffer_bytes(sizes: StageSizes, num_workers: int, zero_stage: int) -> int:
    """Returns what DeepSpeed takes beside states while gradients are exchanged and the optimiser steps, as measured.

    A bucket holds the gradients of up to `MAX_BUCKET` values, or of one parameter that is larger. In its step the
    optimiser holds the gradient of a worker's own shard once more, and two tensors of its size. Under ZeRO-3 parameters
    that were gathered for a module stay for the next one.
    """
    P, W = sizes.num_parameters, num_workers
    bucket = 4 * max(min(P, MAX_BUCKET), sizes.num_largest)
    match zero_stage:
        case 1 | 2:
            return int(bucket + 12 * P / W)
        case 3:
            return int(bucket + 4 * min(P, _LIVE) + 18 * P / W)
        case _:
            return 0


def _saved_bytes(stage: Stage, batch: WeightBatch, noise: KeyedNoise) -> int:
    """Returns the bytes of what autograd keeps of a forward pass, beside the parameters."""
    sizes: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = stage.training
    stage.eval()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = stage(batch, noise)
    del result
    stage.train(was_training)
    return sum(sizes.values())


def _amount(num: int) -> str:
    return f"{num / 1e6:.3g} M" if num >= 1e5 else str(num)
