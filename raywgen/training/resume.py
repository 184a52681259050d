"""The state from which a run goes on: its newest checkpoint that can be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch

from raywgen.config import ConfigError
from raywgen.generators import Generator
from raywgen.training.checkpoints import CheckpointError, CheckpointManager, TrainState
from raywgen.training.run_spec import RunSpec

Warn = Callable[[str], None]
"""Takes a sentence about a checkpoint that is skipped."""


def resumed_state(spec: RunSpec, generator: Generator, digest: str, warn: Warn) -> TrainState:
    """The state from which a run goes on: its newest usable checkpoint, else `init_from`, else the beginning.

    Args:
        spec: The run.
        generator: A fresh generator of the run.
        digest: Digest of the corpus, see `data_digest`.
        warn: Called for each checkpoint that is skipped.

    Raises:
        ConfigError: The corpus holds other checkpoints than it did when the run was begun.
        CheckpointError: `init_from` cannot be used.
    """
    config = spec.config
    state, skipped = CheckpointManager(config.out).newest(lambda found: found.check(generator))
    if state is not None and state.corpus != digest:
        raise ConfigError(
            f"{config.out} was begun with other checkpoints than {config.corpus} holds now, so it cannot go on with "
            "them; restore the corpus, or give another out"
        )
    if state is None and spec.init_from:
        try:
            state = replace(TrainState.load(spec.init_from), corpus=digest)
            state.check(generator)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; train the run that stopped in {spec.init_from} again") from error
    state = state or TrainState(corpus=digest)
    names = [*(stage.name for stage in generator.stages()), "none: all are trained"]
    where = f"step {state.step} of stage '{names[state.stage]}'" if state.tensors else "its beginning"
    for sentence in skipped:
        warn(f"{sentence}; training goes on from {where}")
    return state


def versions() -> dict[str, str]:
    """The versions of what decides the values of a step."""
    try:
        own = version("raywgen")
    except PackageNotFoundError:
        own = "not installed"
    return {"raywgen": own, "torch": torch.__version__}
