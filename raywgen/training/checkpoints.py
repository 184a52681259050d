"""A run's checkpoints: how far it is and all that it needs to go on, whoever trains it and wherever it lies.

A checkpoint is a folder with `state.safetensors` and `progress.json`. The latter is written last and holds a digest of
both, so that a checkpoint that is damaged or half there is noticed and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raywgen.files import sync_folder, write_text
from raywgen.generators import Generator
from raywgen.inputs import open_regular, read_json
from raywgen.weights import save_state_dict

CHECKPOINTS = "checkpoints"
STATE, PROGRESS = "state.safetensors", "progress.json"
_NUM_KEPT = 2
_FRESH = ".new"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class CheckpointWarning(UserWarning):
    """A checkpoint is passed over, and training goes on from the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """The position of a run, and all it needs to go on.

    Attributes:
        stage: Index of the stage; one past the last when the run is done.
        step: Steps taken in that stage.
        corpus: Digest of the checkpoints that the run is trained on; see `RunRows.digest`.
        tensors: Generator state under `model.`, optimiser state under `optimizer.`, averages of
            parameters under `ema.`, the stage's own state under `stage.`.
    """

    stage: int = 0
    step: int = 0
    corpus: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Writes it without pickles."""
        state = Path(folder) / STATE
        save_state_dict(self.tensors, state, {"kind": "raywgen checkpoint"})
        content = {"stage": self.stage, "step": self.step, "corpus": self.corpus}
        write_text(Path(folder) / PROGRESS, json.dumps(content | {"sha256": _digest(content, state)}))

    @classmethod
    def load(cls, folder: str | Path) -> TrainState:
        """Maps what `save` wrote: tensors lie in the file until they are copied, so that every worker may hold them.

        Raises:
            CheckpointError: A file is missing, damaged, or belongs to another checkpoint; or a value is NaN.
        """
        path, state = Path(folder) / PROGRESS, Path(folder) / STATE
        try:
            content = read_json(path)
            expected = content.pop("sha256")
            progress = cls(**content)
            if (type(progress.stage), type(progress.step), type(progress.corpus)) != (int, int, str):
                raise TypeError("a value of another type")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is {_told(error)}") from error
        try:
            if _digest(content, state) != expected:
                raise CheckpointError(f"{state} is damaged, or belongs to another {PROGRESS}: its digest differs")
            progress.tensors.update(load_file(state))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{state} is {_told(error)}") from error
        if spoilt := [name for name, tensor in progress.tensors.items() if tensor.isnan().any()]:
            raise CheckpointError(f"{state} holds NaN in '{spoilt[0]}'")
        return progress

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def check(self, generator: Generator) -> None:
        """Refuses a checkpoint of another generator.

        Raises:
            CheckpointError: Stage, step, names or shapes are not those of the generator's run.
        """
        stages = generator.stages()
        if not 0 <= self.stage <= len(stages) or not 0 <= self.step <= ([*_steps(stages), 0][self.stage]):
            raise CheckpointError(f"it stands at step {self.step} of stage {self.stage}, which this run does not have")
        if (self.stage, self.step) == (0, 0):
            return
        _compare(self.part("model."), generator.state_dict(), "generator")
        if self.step and stages[self.stage].config.optimizer.kind == "adamw":
            wanted = {
                f"{name}|{key}": parameter
                for name, parameter in stages[self.stage].named_parameters()
                for key in ("exp_avg", "exp_avg_sq")
            }
            found = self.part("optimizer.")
            found.pop("step", None)
            _compare(found, wanted, "optimiser")
        if self.step and stages[self.stage].config.optimizer.ema_decay:
            _compare(self.part("ema."), dict(stages[self.stage].named_parameters()), "average")


class CheckpointManager:
    """The checkpoints of a run folder: the newest one, and the one before.

    Args:
        out: Run folder.
    """

    def __init__(self, out: str | Path) -> None:
        self._folder = Path(out) / CHECKPOINTS

    def save(self, progress: TrainState) -> None:
        """Writes beside and then names it: wherever this is killed, a whole checkpoint is there."""
        fresh, target = self._folder / _FRESH, self._folder / _name(progress)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        progress.save(fresh)
        if target.is_dir():  # The run was here before, and had to go on from an earlier checkpoint.
            shutil.rmtree(target)
        fresh.rename(target)
        sync_folder(self._folder)
        names = self._names()
        # Later ones were passed over, as the run has gone on from before them.
        for name in [name for name in names if name > target.name]:
            shutil.rmtree(self._folder / name, ignore_errors=True)
        for name in [name for name in names if name <= target.name][:-_NUM_KEPT]:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def newest(self, check: Callable[[TrainState], None]) -> tuple[TrainState | None, list[str]]:
        """The newest checkpoint that can be used, if there is one, and in words which were passed over and why.

        Args:
            check: Raises `CheckpointError` for one that is whole and yet of no use.
        """
        passed_over: list[str] = []
        for name in reversed(self._names()):
            folder = self._folder / name
            try:
                progress = TrainState.load(folder)
                check(progress)
            except CheckpointError as error:
                passed_over.append(f"checkpoint {folder} is passed over: {error}")
            else:
                return progress, passed_over
        return None, passed_over

    def position(self) -> tuple[int, int] | None:
        """Stage and step of the newest checkpoint, by its name alone."""
        names = self._names()
        if not names:
            return None
        stage, _, step = names[-1].partition("-")
        return int(stage), int(step)

    def _names(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("[0-9]*-[0-9]*") if path.is_dir())


def _name(progress: TrainState) -> str:
    """Names sort as their checkpoints follow one another."""
    return f"{progress.stage:02d}-{progress.step:09d}"


def _steps(stages: Sequence[Any]) -> list[int]:
    return [stage.config.num_steps for stage in stages]


def _digest(content: dict[str, Any], state: Path) -> str:
    """Changes with the position as well as with the tensors' file."""
    digest = hashlib.sha256(json.dumps([content["stage"], content["step"], content["corpus"]]).encode())
    with open_regular(state) as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _compare(found: dict[str, Tensor], wanted: dict[str, Any], what: str) -> None:
    if strange := sorted(found.keys() ^ wanted.keys()):
        raise CheckpointError(f"'{strange[0]}' is in the checkpoint or in the {what} alone")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, in the {what} {tuple(tensor.shape)}"
            raise CheckpointError(f"'{name}' has the shape {shapes}")


def _told(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return f"damaged ({getattr(error, 'strerror', None) or repr(error)})"
