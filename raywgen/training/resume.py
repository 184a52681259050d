"""The checkpoint that a run goes on from: its newest one that can be used."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from raywgen.config import ConfigError
from raywgen.generators import Generator
from raywgen.storage import Storage
from raywgen.training.checkpoints import Checkpoint, CheckpointError, CheckpointManager, check_fits
from raywgen.training.run_spec import RunSpec

Warn = Callable[[str], None]
"""Takes a sentence about a checkpoint that is skipped."""


def resumed_checkpoint(
    spec: RunSpec,
    generator: Generator,
    digest: str,
    checkpoints: CheckpointManager,
    warn: Warn,
    *,
    thorough: bool = True,
) -> Checkpoint | None:
    """Returns the checkpoint that a run goes on from: its newest usable one, else `init_from`; None for its beginning.

    Every worker must call it, and all get the same one.

    Args:
        spec: The run.
        generator: A generator of the run; its values do not matter.
        digest: Digest of the corpus, see `data_digest`.
        checkpoints: The checkpoints of the run folder.
        warn: Called for each checkpoint that is skipped.
        thorough: Whether checkpoints are read and compared with their digests.

    Raises:
        ConfigError: The corpus holds other checkpoints than it did when the run was begun.
        CheckpointError: `init_from` cannot be used.
    """
    config = spec.config

    def check(found: Checkpoint) -> None:
        check_fits(found.index, generator)

    stored, skipped = checkpoints.newest(check, thorough=thorough)
    if stored is not None and stored.state.corpus != digest:
        raise ConfigError(
            f"{config.out} was begun with other checkpoints than {config.corpus} holds now, so it cannot go on with "
            "them; restore the corpus, or give another out"
        )
    if stored is None and spec.init_from:
        try:
            stored = Checkpoint.open(Storage.at(spec.init_from))
            check(stored)
            stored.verify(range(len(stored.index.parts) if thorough else 0))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; train the run that stopped in {spec.init_from} again") from error
    names = [*(stage.name for stage in generator.stages()), "none: all are trained"]
    where = "its beginning" if stored is None else f"step {stored.state.step} of stage '{names[stored.state.stage]}'"
    for sentence in skipped:
        warn(f"{sentence}; training goes on from {where}")
    return stored


def versions() -> dict[str, str]:
    """The versions of what decides the values of a step."""
    try:
        own = version("raywgen")
    except PackageNotFoundError:
        own = "not installed"
    return {"raywgen": own, "torch": torch.__version__}
