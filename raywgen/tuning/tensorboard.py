"""TensorBoard files of trials: the score at each rung, and the table of hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from raywgen.storage import Storage
from raywgen.tuning.results import TrialRow

FOLDER = "tensorboard"
_METRIC = "score"


def write_tensorboard(rows: Sequence[TrialRow], out: str) -> None:
    """Writes the trials that have no file yet, and rewrites those that have gone further since."""
    from torch.utils.tensorboard import SummaryWriter

    storage = Storage.at(out)
    for row in rows:
        if row.score is None:
            continue
        folder, reached = f"{FOLDER}/{row.trial}", f"rung-{row.scores[-1].rung}"
        if storage.size(f"{folder}/{reached}") is not None:
            continue
        storage.delete(folder)
        knobs = {
            key: value if isinstance(value, bool | int | float) else str(value) for key, value in row.knobs.items()
        }
        with TemporaryDirectory(prefix="raywgen-") as temporary:
            with SummaryWriter(temporary) as writer:
                for score in row.scores:
                    writer.add_scalar(_METRIC, score.score, score.steps)
                # Without a name of the run TensorBoard would make another folder, named by the clock.
                writer.add_hparams(knobs, {f"hparam/{_METRIC}": row.score}, run_name=".")
            Path(temporary, reached).touch()
            storage.upload(temporary, folder, last=reached)
