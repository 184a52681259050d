"""The bytes that a run writes into its folder, from below, so that a disk without room is noticed before it begins."""

from __future__ import annotations

import math

from raywgen.generators import Generator, Stage
from raywgen.training.config import TrainConfig
from raywgen.training.strategy import StageSizes


def least_run_bytes(generator: Generator, config: TrainConfig, stop_at: float = 1.0) -> int:
    """Returns the bytes that a run's folder holds at once, at least, at the moment when it holds most.

    A checkpoint is written before the one that it replaces is removed, and every stage leaves its generator. Metrics,
    buffers, starts, and checkpoints of the stages before are left out.

    Args:
        generator: A generator of the run; its parameters need no values.
        config: The run.
        stop_at: Share of the last stage's steps after which the run stops, see `launch`.
    """
    model, stages = sum(parameter.nbytes for parameter in generator.parameters()), generator.stages()
    kept, most = config.keep_newest, 0
    for index, stage in enumerate(stages):
        is_last, num_steps = index + 1 == len(stages), stage.config.num_steps
        stop = math.ceil(stop_at * num_steps) if is_last else num_steps
        within, bundles = model + _state_bytes(stage), index * model
        num_saves = (stop - 1) // config.save_every + (stop < num_steps)
        most = max(most, bundles + min(num_saves, kept + 1) * within)
        if stop < num_steps:  # A copy of the newest checkpoint lies in the snapshot, with its generator.
            most = max(most, bundles + (min(num_saves, kept) + 1) * within + model)
        else:  # The checkpoint after a stage, its generator, and after the last stage the run's own.
            most = max(most, bundles + min(num_saves, kept) * within + model)
            most = max(most, bundles + min(num_saves, kept - 1) * within + (3 if is_last else 2) * model)
    return most


def _state_bytes(stage: Stage) -> int:
    """Returns the bytes of moments and averages of a stage's parameters."""
    sizes = StageSizes.of_states(stage)
    return 4 * sizes.num_parameters * (2 * sizes.has_moments + sizes.has_averages)
