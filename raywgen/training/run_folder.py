"""The files of a run folder, and whether its run is done."""

from __future__ import annotations

import warnings
from pathlib import Path

from raywgen.config import ConfigError
from raywgen.locations import joined
from raywgen.storage import Storage
from raywgen.training.checkpoints.errors import CheckpointWarning

CONFIG = "config.yaml"
BUNDLE = "generator"
"""The trained generator; a run that has it is done."""
STAGES = "stages"
"""The generator after each stage, one bundle each."""
STARTS = "starts"
SNAPSHOTS = "snapshots"
EXPORTS = "exports"


def check_is_run(out: str | Path) -> None:
    """Refuses a folder that holds no run.

    Raises:
        ConfigError: It has no config.
    """
    if Storage.at(out).size(CONFIG) is None:
        raise ConfigError(f"{out} holds no run ({CONFIG} is missing); give the `out` of `raywgen train`")


def snapshot_folder(out: str | Path, stop_at: float) -> str:
    """Returns the folder in which `launch(..., stop_at=...)` leaves the generator and a copy of its checkpoint."""
    return joined(out, f"{SNAPSHOTS}/{stop_at:g}")


def is_done(out: str | Path) -> bool:
    """Whether a run's generator is there and whole; a damaged one is written again.

    Raises:
        BundleFormatError: Another version of raywgen wrote it; it is not to be overwritten.
    """
    # Imported late: torch takes seconds, and whoever asks how far a run is needs none of it.
    from raywgen.generators.bundle import BundleError, BundleFormatError, check_bundle

    folder = joined(out, BUNDLE)
    if Storage.at(folder).size("generator.json") is None:
        return False
    try:
        check_bundle(folder)
    except BundleFormatError:
        raise
    except BundleError as error:
        reason = str(error).partition(";")[0]
        warn(f"{reason}; training goes on from the newest checkpoint, and the generator is written again")
        return False
    return True


def warn(message: str) -> None:
    """Warns the user of a checkpoint or generator that is skipped."""
    warnings.warn(message, CheckpointWarning, stacklevel=2)
