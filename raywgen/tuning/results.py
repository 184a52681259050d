"""What a trial leaves in its folder, and the table of all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from raywgen.config import ConfigError
from raywgen.files import write_text
from raywgen.sealed import SealError, sealed_json, unseal
from raywgen.tuning.space import Values

TRIALS = "trials"
CORPORA = "corpora"
TABLE = "trials.jsonl"
_STATE = "trial.json"


class TuneError(RuntimeError):
    """A search that found nothing; the message holds the first trial's reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a trial reached at one rung.

    Attributes:
        rung: From 1 on.
        score: The objective, in [0, 1]; 0 of a trial that failed.
        steps: Optimiser steps up to there, of all stages.
        seconds: Of preparing, training and judging up to there.
    """

    rung: int
    score: float
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialState:
    """All that a trial has to know to go on.

    Attributes:
        trial: Its name, `000` on.
        knobs: Its values now.
        scores: Rung by rung.
        generation: How often it went on from another trial.
        start: Pause of another trial's run that this generation began from.
        failed: Why it cannot be trained; empty otherwise.
    """

    trial: str
    knobs: Values
    scores: tuple[Score, ...] = ()
    generation: int = 0
    start: str = ""
    failed: str = ""

    def at(self, rung: int) -> Score | None:
        """The score of a rung, where it was reached; of a trial that failed that of its end."""
        found = next((score for score in self.scores if score.rung == rung), None)
        return self.scores[-1] if found is None and self.failed and self.scores else found

    def with_score(self, score: Score) -> Self:
        """One more."""
        return replace(self, scores=(*self.scores, score))

    def save(self, folder: Path) -> None:
        """In one step."""
        write_text(folder / _STATE, sealed_json(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What `save` wrote; None where there is none.

        Raises:
            ConfigError: The file is damaged.
        """
        path = folder / _STATE
        if not path.is_file():
            return None
        try:
            content = unseal(path.read_bytes())
        except SealError as error:
            raise ConfigError(
                f"{path} is damaged ({error}); delete it and run the same command, which scores this trial again"
            ) from error
        return cls(**{**content, "scores": tuple(Score(**score) for score in content["scores"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One trial in the table.

    Attributes:
        trial: Its name.
        status: `done` (to the last rung), `stopped` (by the scheduler), `failed`, or `unfinished`.
        scores: Rung by rung.
        knobs: Values of those that exist.
        reason: Why it failed.
    """

    trial: str
    status: str
    scores: tuple[Score, ...]
    knobs: Values = field(default_factory=dict)
    reason: str = ""

    @property
    def score(self) -> float | None:
        """At the last rung that it reached; None where there is none, or where it failed."""
        return self.scores[-1].score if self.scores and self.status != "failed" else None

    @property
    def steps(self) -> int:
        """Optimiser steps that it took."""
        return self.scores[-1].steps if self.scores else 0

    def score_at(self, rung: int) -> float | None:
        """At one rung."""
        return next((score.score for score in self.scores if score.rung == rung), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneResult:
    """What a search found.

    Attributes:
        out: Its folder.
        rows: In the order in which trials began.
        best: The best of those that went furthest.
        num_rungs: Of a whole trial.
    """

    out: str
    rows: tuple[TrialRow, ...]
    best: TrialRow
    num_rungs: int

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all trials."""
        return sum(row.steps for row in self.rows)


def trial_folder(out: str, trial: str) -> Path:
    """Where one lies."""
    return Path(out) / TRIALS / trial


def row_of(state: TrialState, num_rungs: int, is_over: bool) -> TrialRow:
    """Of a trial whose search says whether it is over."""
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
    """The highest score at the highest rung that any trial reached; the first of equals.

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
    """One line of JSON for each trial."""
    write_text(Path(out) / TABLE, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
