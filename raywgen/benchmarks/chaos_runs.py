"""The small runs that the benchmark `chaos` breaks, and what their folders tell of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raywgen.config import merge_config
from raywgen.corpus import Corpus
from raywgen.training import TrainConfig, read_metrics
from raywgen.training.checkpoints import CheckpointManager
from raywgen.training.stages_file import read_stages
from raywgen.training.workers_log import Start, read_workers
from raywgen.zoo import ZooConfig, train_zoo

METHODS = ("igpg", "mcdi", "lohp", "direct", "hypernetwork")
_POLL_SECONDS = 0.02
# A large epsilon and a small rate keep Adam from blowing up the last digit, in which runs of other numbers of workers
# differ, over hundreds of steps.
_OPTIMIZER = {"learning_rate": 2e-4, "warmup_steps": 0, "epsilon": 1e-3}
_NETWORK = {"width": 16, "num_layers": 1, "num_heads": 2, "chunk_length": 32}
_ZOO = ZooConfig(
    networks=[[64, 6, 2], [64, 5, 4, 2]],
    num_seen_tasks=12,
    num_validation_tasks=3,
    num_unseen_tasks=4,
    seeds_per_task=2,
    num_steps=40,
    checkpoint_steps=[10, 20, 30, 40],
    num_condition_samples=32,
)


class LostError(RuntimeError):
    """A run did not come back; the message says after what."""


def chaos_corpus(folder: Path) -> Corpus:
    """Trains a zoo of tiny networks, or returns the one that is there."""
    return train_zoo(_ZOO, str(folder), distributed=False)


def run_config(method: str, corpus: str, out: Path, num_steps: int, **changes: Any) -> TrainConfig:
    """Returns the config of a run that logs every step.

    Args:
        method: One of `METHODS`.
        corpus: The corpus.
        out: Run folder.
        num_steps: Steps of its main stage; IGPG's tokeniser takes 12 before, stages after it take 12.
        changes: Other settings of the run.
    """
    settings = {"method": method, "corpus": corpus, "out": str(out), "generator": _generator(method, num_steps)}
    settings |= {"log_every": 1, "validate_every": 1_000_000, "num_condition_samples": 16, "num_query_samples": 16}
    return merge_config(TrainConfig, [("chaos", settings | {"zero_stage": 0} | changes)])


def _generator(method: str, num_steps: int) -> dict[str, Any]:
    stage = {"num_steps": num_steps, "batch_size": 6, "optimizer": _OPTIMIZER}
    short = stage | {"num_steps": 12}
    if method == "igpg":
        tokenizer = short | {"chunk_length": 32, "quantiser": {"num_levels": 2, "num_codes": 8}, "width": 16}
        return {
            "tokenizer": tokenizer,
            "prior": stage | {"width": 16, "num_layers": 1, "num_heads": 2},
            # Neither of the two is a mean over networks; they depend on the number of workers.
            "task_loss": short | {"nll_weight": 0.0, "diversity_weight": 0.0, "temperature": 0.0},
        }
    if method == "mcdi":
        return {"network": _NETWORK, "denoiser": stage, "task_loss": short | {"num_steps": 0}}
    if method == "lohp":
        return {
            "network": _NETWORK,
            "path": {"num_steps": 4, "length": 2},
            "sampling": {"num_steps": 2},
            "policy": stage,
        }
    if method == "direct":
        return {"network": _NETWORK, "regression": stage, "task_loss": short | {"num_steps": 0}}
    return {"width": 16, "task_loss": stage}


Losses = Mapping[tuple[str, int], float]
"""Loss by stage and step."""


def losses_of(out: str | Path) -> dict[tuple[str, int], float]:
    """Returns the loss of each step of a run."""
    return {(row["stage"], row["step"]): row["loss"] for row in read_metrics(out)}


def loss_difference(found: Losses, wanted: Losses) -> float:
    """Returns the largest difference of a loss relative to the undisturbed run's; infinite if steps are missing."""
    if found.keys() != wanted.keys():
        return float("inf")
    return max(abs(found[key] - loss) / max(abs(loss), 1e-6) for key, loss in wanted.items())


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a fault.

    Attributes:
        name: The fault.
        lost_steps: Steps that were taken again.
        seconds: Seconds until the run had gone on.
        difference: Largest relative difference of a loss from the undisturbed run's; infinite if the run was lost.
    """

    name: str
    lost_steps: int = 0
    seconds: float = 0.0
    difference: float = float("inf")

    @property
    def survived(self) -> bool:
        """Whether the run came to its end with all its steps."""
        return self.difference < float("inf")

    def with_losses(self, difference: float) -> Outcome:
        """Returns the outcome with the difference of the losses of its run."""
        return replace(self, difference=difference)


@dataclass(frozen=True, slots=True)
class RunView:
    """The state of a run, as its folder tells it.

    Attributes:
        out: The run folder, a path or a URI.
    """

    out: str | Path

    def taken(self) -> int:
        """Returns the steps taken, over all stages, by the newest row of the metric log."""
        rows = read_metrics(self.out)
        return self.total(rows[-1]["stage"], rows[-1]["step"] + 1) if rows else 0

    def total(self, stage: str, step: int) -> int:
        """Returns the steps of all stages before, and of this one."""
        total = 0
        for record in read_stages(self.out):
            if record.name == stage:
                return total + step
            total += record.num_steps
        return total

    def saved(self) -> int:
        """Returns the steps taken, over all stages, at the newest checkpoint."""
        position = CheckpointManager(str(self.out)).position()
        if position is None:
            return 0
        return sum(record.num_steps for record in read_stages(self.out)[: position[0]]) + position[1]

    def starts(self) -> list[Start]:
        """Returns each start of the run's workers."""
        return [event for event in read_workers(self.out) if isinstance(event, Start)]


def wait_for(is_there: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits until something is so.

    Raises:
        LostError: It is not so in time.
    """
    end = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > end:
            raise LostError(f"{what}: not within {seconds:g} s")
        time.sleep(_POLL_SECONDS)
