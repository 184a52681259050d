"""The state that a trial keeps in its folder, and the table of all trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from raywgen.config import ConfigError
from raywgen.inputs import MAX_JSON_BYTES, parse_json
from raywgen.locations import joined
from raywgen.sealed import SealError, sealed_json, unseal
from raywgen.storage import Storage, read_file
from raywgen.tuning.space import Values

TRIALS = "trials"
CORPORA = "corpora"
TABLE = "trials.jsonl"
_STATE = "trial.json"


class TuneError(RuntimeError):
    """A search found nothing; the message holds the first trial's reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RungScore:
    """The score of a trial at one rung.

    Attributes:
        rung: Number of the rung, from 1 on.
        score: The objective, in [0, 1]; 0 where the trial failed.
        steps: Optimiser steps of all stages up to there.
        seconds: Time of preparing, training and judging up to there.
    """

    rung: int
    score: float
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialState:
    """All that a trial needs to resume.

    Attributes:
        trial: Its name, `000` on.
        knobs: Its current values.
        scores: Its scores, rung by rung.
        generation: Number of times that it has continued from another trial.
        start: Checkpoint of another trial's run that this generation began from.
        failed: Why it cannot be trained; empty otherwise.
    """

    trial: str
    knobs: Values
    scores: tuple[RungScore, ...] = ()
    generation: int = 0
    start: str = ""
    failed: str = ""

    def at(self, rung: int) -> RungScore | None:
        """Returns the score of a rung, None where it was not reached; a failed trial's last score counts for all."""
        found = next((score for score in self.scores if score.rung == rung), None)
        return self.scores[-1] if found is None and self.failed and self.scores else found

    def with_score(self, score: RungScore) -> Self:
        """Returns a state with one more score."""
        return replace(self, scores=(*self.scores, score))

    def save(self, folder: str | Path) -> None:
        """Writes the state in one step."""
        Storage.at(folder).write(_STATE, sealed_json(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """Reads what `save` wrote; None where there is nothing.

        Raises:
            ConfigError: The file is damaged.
        """
        path = joined(folder, _STATE)
        try:
            content = unseal(read_file(path, MAX_JSON_BYTES))
        except FileNotFoundError:
            return None
        except SealError as error:
            raise ConfigError(
                f"{path} is damaged ({error}); delete it and run the same command, which scores this trial again"
            ) from error
        return cls(**{**content, "scores": tuple(RungScore(**score) for score in content["scores"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One trial in the table.

    Attributes:
        trial: Its name.
        status: `done` (reached the last rung), `stopped` (by the scheduler), `failed`, or `unfinished`.
        scores: Its scores, rung by rung.
        knobs: Values of the knobs that exist in it.
        reason: Why it failed.
    """

    trial: str
    status: str
    scores: tuple[RungScore, ...]
    knobs: Values = field(default_factory=dict)
    reason: str = ""

    @property
    def score(self) -> float | None:
        """Score at the last rung that it reached; None where there is none, or where it failed."""
        return self.scores[-1].score if self.scores and self.status != "failed" else None

    @property
    def steps(self) -> int:
        """Number of optimiser steps that it took."""
        return self.scores[-1].steps if self.scores else 0

    def score_at(self, rung: int) -> float | None:
        """Returns the score at one rung."""
        return next((score.score for score in self.scores if score.rung == rung), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneResult:
    """The result of a search.

    Attributes:
        out: Its folder.
        rows: Trials in the order in which they began.
        best: The best of the trials that went furthest.
        num_rungs: Rungs of a whole trial.
    """

    out: str
    rows: tuple[TrialRow, ...]
    best: TrialRow
    num_rungs: int

    def __repr__(self) -> str:
        return f"TuneResult({self.out!r}, {len(self.rows)} trials, best {self.best.trial})"

    @property
    def total_steps(self) -> int:
        """Number of optimiser steps of all trials."""
        return sum(row.steps for row in self.rows)


def trial_folder(out: str, trial: str) -> str:
    """Returns the folder of a trial."""
    return joined(out, f"{TRIALS}/{trial}")


def row_of(state: TrialState, num_rungs: int, is_over: bool) -> TrialRow:
    """Returns the row of a trial; `is_over` says whether its search has ended it."""
    reached = state.scores[-1].rung if state.scores else 0
    if state.failed:
        status = "failed"
    elif reached == num_rungs:
        status = "done"
    else:
        status = "stopped" if is_over and reached else "failed" if is_over else "unfinished"
    reason = state.failed or ("its process died; see Ray's logs" if status == "failed" else "")
    return TrialRow(trial=state.trial, status=status, scores=state.scores, knobs=state.knobs, reason=reason)


def best_row(rows: Sequence[TrialRow]) -> TrialRow:
    """Returns the trial with the highest score at the highest rung that any reached; the first of equals.

    Raises:
        TuneError: No trial has a score.
    """
    judged = [row for row in rows if row.score is not None]
    if not judged:
        reason = next((row.reason for row in rows if row.reason), "no trial has begun")
        raise TuneError(f"no trial could be judged: {reason}")
    furthest = max(row.scores[-1].rung for row in judged)
    return max((row for row in judged if row.scores[-1].rung == furthest), key=lambda row: row.scores[-1].score)


def write_table(rows: Sequence[TrialRow], out: str) -> None:
    """Writes one line of JSON for each trial."""
    Storage.at(out).write(TABLE, "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())


def read_table(out: str) -> list[TrialRow]:
    """Reads what `write_table` wrote.

    Raises:
        ConfigError: The table is missing or damaged.
    """
    path = joined(out, TABLE)
    try:
        found = [parse_json(line) for line in read_file(path, MAX_JSON_BYTES).decode().splitlines()]
        return [
            TrialRow(**{**content, "scores": tuple(RungScore(**score) for score in content["scores"])})
            for content in found
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); the command that began this search writes it") from error
