"""The checkpoints of a run folder: which is the newest, which are kept, and the writing of new ones beside training."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from raywgen.locations import joined
from raywgen.storage import Storage
from raywgen.training.checkpoints.errors import CheckpointError, SaveError
from raywgen.training.checkpoints.group import Alone, Group
from raywgen.training.checkpoints.index import INDEX, TrainState
from raywgen.training.checkpoints.patience import patiently
from raywgen.training.checkpoints.position import CHECKPOINTS, checkpoint_names, newest_position, position_of
from raywgen.training.checkpoints.reader import Checkpoint
from raywgen.training.checkpoints.slices import Part, Slice, own_slices
from raywgen.training.checkpoints.writer import forget_old_index, write_index, write_part

_GRACE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The rules by which checkpoints of a run are kept.

    Attributes:
        newest: Number of the newest ones.
        best: Number of those of each stage with the lowest metric, beside the newest.
        metric: Name of that metric, as in the metric log.
    """

    newest: int = 2
    best: int = 0
    metric: str = "val_loss"


class CheckpointManager:
    """The checkpoints of a run folder.

    Args:
        out: Run folder, a local path or a URI.
        group: The workers that save together; every worker has a manager of its own.
        launch: A name for this launch of the workers, see `agree_on_folder`.
        retention: Which checkpoints are kept.
    """

    def __init__(
        self, out: str | Path, group: Group | None = None, launch: str = "", retention: Retention | None = None
    ) -> None:
        self._storage, self._out = Storage.at(f"{out}"), out
        self._group, self._launch = group or Alone(), launch
        self._retention = retention or Retention()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._scores: dict[str, float] = {}

    # Save

    def save(self, state: TrainState, tensors: Mapping[str, Part]) -> None:
        """Copies this worker's slices into the host's memory and writes them in the background.

        Every worker must call it. It waits for the save before this one to be durable.

        Raises:
            SaveError: The save before this one failed.
        """
        self.wait()
        own = own_slices(tensors, self._group.rank, self._group.num_workers)
        held = {name: part.on_host() for name, part in own.items()}
        self._thread = threading.Thread(target=self._write, args=(state, held), daemon=True)
        self._thread.start()

    @property
    def is_saving(self) -> bool:
        """Whether this worker still writes, or the first one still waits for the others."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether the save under way has failed on this worker, so that `wait` will raise."""
        return self._failure is not None

    def wait(self) -> None:
        """Waits until the save under way is durable; every worker must call it.

        Raises:
            SaveError: It failed on some worker; all workers raise it.
        """
        if self._thread is None:
            return
        self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        reasons = [reason for reason in self._group.exchange(str(failure) if failure is not None else "") if reason]
        if reasons:
            position = self.position()
            last = "there is none before it" if position is None else f"the last one is {self.folder_of(position)}"
            raise SaveError(f"{self._out}: a checkpoint could not be written, {last}: {reasons[0]}") from failure

    def close(self) -> None:
        """Gives the save under way some time to end where training ends by an error, as other workers may be gone."""
        if self._thread is not None:
            self._thread.join(_GRACE_SECONDS)

    def _write(self, state: TrainState, slices: dict[str, Slice]) -> None:
        folder, group = f"{CHECKPOINTS}/{state.folder}", self._group
        try:
            if group.rank == 0:
                forget_old_index(self._storage, folder)
            own = write_part(self._storage, folder, slices, group.rank, group.num_workers, self._launch)
            slices.clear()
            if group.rank == 0:
                write_index(self._storage, folder, state, own, group.num_workers, self._launch)
                self._prune(state)
        except BaseException as error:
            self._failure = error

    def _prune(self, state: TrainState) -> None:
        names = self._names()
        if self._retention.metric in state.metrics:
            self._scores[state.folder] = state.metrics[self._retention.metric]
        # Later ones were passed over, as the run has gone on from before them.
        kept = {*[name for name in names if name <= state.folder][-self._retention.newest :], *self._best(names)}
        for name in names:
            if name not in kept or name > state.folder:
                self._remove(name)

    def _best(self, names: list[str]) -> list[str]:
        if not self._retention.best:
            return []
        for name in names:
            if name not in self._scores:
                self._scores[name] = self._score(name)
        scored = [name for name in names if self._scores[name] < float("inf")]
        stages = {name.partition("-")[0] for name in scored}
        ranked = sorted(scored, key=lambda name: (self._scores[name], name))
        return [
            name
            for stage in stages
            for name in [name for name in ranked if name.startswith(f"{stage}-")][: self._retention.best]
        ]

    def _score(self, name: str) -> float:
        try:
            return self.open(name).state.metrics.get(self._retention.metric, float("inf"))
        except CheckpointError:
            return float("inf")

    def _remove(self, name: str) -> None:
        """Makes a checkpoint invalid before the rest of it goes, wherever this is killed."""
        for file in (INDEX, ""):
            self._storage.delete(f"{CHECKPOINTS}/{name}/{file}".rstrip("/"))

    # Read

    def newest(
        self,
        check: Callable[[Checkpoint], None],
        *,
        thorough: bool = True,
        among: Callable[[int, int], bool] | None = None,
    ) -> tuple[Checkpoint | None, list[str]]:
        """Returns the newest checkpoint that can be used, if there is one, and sentences about those passed over.

        Every worker must call it; each compares its share of the parts with their digests.

        Args:
            check: Raises `CheckpointError` for one that is whole and yet of no use.
            thorough: Whether parts are read and compared with their digests, and not their sizes alone.
            among: Whether a checkpoint is looked at, by its stage and step; by default all are.
        """
        passed_over: list[str] = []
        group = self._group
        names = [name for name in reversed(patiently(self._names)) if among is None or among(*position_of(name))]
        for name in json.loads(group.exchange(json.dumps(names))[0]):
            found, reason = None, ""
            try:
                found = self.open(name)
                check(found)
                if thorough:
                    found.verify(range(group.rank, len(found.index.parts), group.num_workers))
            except CheckpointError as error:
                reason = str(error)
            reasons = [reason for reason in group.exchange(reason) if reason]
            if not reasons:
                return found, passed_over
            passed_over.append(f"checkpoint {self._out}/{CHECKPOINTS}/{name} is passed over: {reasons[0]}")
        return None, passed_over

    def open(self, name: str) -> Checkpoint:
        """Opens a checkpoint by the name of its folder.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        relative = f"{CHECKPOINTS}/{name}"
        root, location = self._storage.path(relative), joined(self._storage.name, relative)
        return Checkpoint.open(replace(self._storage, root=root, name=location))

    def position(self) -> tuple[int, int] | None:
        """Stage and step of the newest durable checkpoint, by its name alone."""
        return newest_position(self._storage)

    @staticmethod
    def folder_of(position: tuple[int, int]) -> str:
        """Returns the name of the folder of a checkpoint."""
        return TrainState(stage=position[0], step=position[1]).folder

    def _names(self) -> list[str]:
        return checkpoint_names(self._storage)
