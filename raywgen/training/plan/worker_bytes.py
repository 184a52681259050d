"""The bytes that a worker takes in a stage, part by part, and at its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from raywgen.training.config import TrainConfig
from raywgen.training.engine import Offload
from raywgen.training.plan.shapes import GeneratorShape, StageShape
from raywgen.training.prefetch import num_ahead
from raywgen.training.strategy import buffer_bytes, state_parts

# Anonymous memory of the interpreter with its libraries, as measured: with torch alone, and with DeepSpeed.
_TORCH_BYTES, _DEEPSPEED_BYTES = 330 << 20, 400 << 20


class Choice(NamedTuple):
    """The way to train a stage: over so many workers, sharded and offloaded so, in so many parts."""

    num_workers: int
    zero_stage: int
    offload: Offload
    accumulate: int
    recomputed: bool = False

    def settings(self) -> str:
        """Returns the settings as they are given to a run."""
        parts = [f"num_workers={self.num_workers}", f"accumulate={self.accumulate}"]
        if self.num_workers:
            parts[1:1] = [f"zero_stage={self.zero_stage}"] + [f"offload={self.offload}"] * (self.offload != "none")
        return " ".join(parts + ["activation_checkpointing=true"] * self.recomputed)


@dataclass(frozen=True, kw_only=True)
class WorkerBytes:
    """The bytes of a worker in a stage; with GPUs some lie on the device and the rest in the node's memory.

    Attributes:
        weights: Parameters and buffers of the generator, this stage's and those of the others.
        gradients: Gradients.
        optimizer: The optimiser's state.
        averages: Moving averages of the parameters.
        buffers: What the engine takes beside them, such as buckets for the exchange of gradients.
        activations: What forward and backward pass of one part of a worker's share take.
        batches: The batch under way and those drawn ahead.
        offloaded: States in the node's memory in place of the device's.
        checkpoint: This worker's part of a checkpoint, which is written from a copy in the node's memory while training
            goes on.
        process: The interpreter with its libraries.
        device: Bytes of the device at the peak.
        host: Bytes of the node's memory at the peak; for training on CPUs all there is.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    buffers: int
    activations: int
    batches: int
    offloaded: int
    checkpoint: int
    process: int
    device: int
    host: int


def worker_bytes(generator: GeneratorShape, stage: StageShape, config: TrainConfig, choice: Choice) -> WorkerBytes:
    """Returns what a worker takes in a stage."""
    W, sizes, on_gpu = max(1, choice.num_workers), stage.sizes, config.device == "cuda"
    zero_stage = choice.zero_stage if choice.num_workers else 0
    held = state_parts(sizes, W, zero_stage, choice.offload)
    all_held = state_parts(sizes, W, zero_stage, "none")
    share = math.ceil(sizes.batch_size / W)
    part = stage.part_bytes(math.ceil(share / choice.accumulate))
    others = 4 * (generator.num_parameters - sizes.num_parameters) + generator.buffer_bytes
    weights = held.parameters + held.gathered + others
    buffers = buffer_bytes(sizes, W, zero_stage) if choice.num_workers else 0
    batches = (2 + num_ahead(share * stage.batch_bytes)) * share * stage.batch_bytes
    # Every worker copies and writes an equal part; before the first checkpoint within the stage there is none.
    saves_midway = stage.num_steps > config.save_every
    checkpoint = (checkpoint_bytes(generator, stage) if saves_midway else 4 * generator.num_parameters) // W
    offloaded = sum(all_held) - sum(held)
    process = _DEEPSPEED_BYTES if zero_stage else _TORCH_BYTES
    states = weights + held.gradients + held.optimizer + held.averages
    # While a stage is prepared it has neither gradients nor moments.
    setting_up = generator.buffer_bytes + 4 * generator.num_parameters + stage.setup_bytes
    validating = states + held.averages + stage.validation_bytes(W, choice.accumulate)
    # Buffers fill while the backward pass gives activations up, and are the fullest when the optimiser steps.
    working = max(states + max(buffers, part), validating) + (0 if on_gpu or not saves_midway else checkpoint)
    # At its end the generator is built anew beside what the engine still holds.
    working = max(working, setting_up, states + 4 * generator.num_parameters)
    if on_gpu:
        device, host = working + share * stage.batch_bytes, process + batches + offloaded + checkpoint
    else:
        device = host = process + batches + working
    return WorkerBytes(
        weights=weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        averages=held.averages,
        buffers=buffers,
        activations=part,
        batches=batches,
        offloaded=offloaded,
        checkpoint=checkpoint,
        process=process,
        device=device,
        host=host,
    )


def checkpoint_bytes(generator: GeneratorShape, stage: StageShape) -> int:
    """Returns the bytes of a checkpoint within a stage: the generator, the optimiser's state, and averages."""
    sizes = stage.sizes
    moments = 8 if sizes.has_moments else 0
    averages = 4 if sizes.has_averages else 0
    return 4 * generator.num_parameters + generator.buffer_bytes + (moments + averages) * sizes.num_parameters
