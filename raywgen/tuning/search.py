"""The search, logged event by event: a resumed one replays its log and then continues.

Sampler and scheduler are Optuna's and Ray Tune's own. Every suggestion and every result is a line of `search.jsonl`. A
new process feeds the lines in their order to a fresh sampler of the same seed and to a fresh scheduler: both are then
in the state that they were in, to the last bit, and trials that were running begin again under their old names, where
they find their own checkpoints.

Neither library can resume so. Ray Tune's snapshots come every few seconds, so the restored state depends on the moment
at which a search was killed. Optuna's journal storage keeps trials but not the state of the sampler's random numbers,
so that a resumed search draws other values than an undisturbed one; it does not give back the order of results across
trials, by which ASHA decides; and it has no checksums, so that a damaged number is taken as it is.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raywgen.config import ConfigError
from raywgen.locations import joined
from raywgen.sealed import SealError, sealed_json, unseal
from raywgen.storage import Storage
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.results import TrialState, trial_folder
from raywgen.tuning.space import Knob, Values, draw
from raywgen.tuning.trial import rung_time

LOG = "search.jsonl"
SUGGEST, REPORT, COMPLETE = "suggest", "report", "complete"
Event = dict[str, Any]
# A search has few trials here: Optuna's default of 10 random ones would be most of them.
_NUM_RANDOM = 5


class SearchLog:
    """Events in the order in which they came; a last line that a kill cut off is dropped.

    Args:
        out: Folder of the search.

    Raises:
        ConfigError: A line is damaged.
    """

    def __init__(self, out: str) -> None:
        self._storage, self._name = Storage.at(out), joined(out, LOG)
        found = self._storage.read(LOG).decode() if self._storage.size(LOG) is not None else ""
        lines = found.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self.events: list[Event] = [self._event(number, line) for number, line in enumerate(whole, start=1)]
        if len(whole) < len(lines):
            self._storage.write(LOG, "".join(whole).encode())

    def _event(self, number: int, line: str) -> Event:
        try:
            return unseal(line)
        except SealError as error:
            raise ConfigError(
                f"{self._name}, line {number}, is damaged ({error}); restore the file from a copy, or give another out"
            ) from error

    def write(self, event: Event) -> None:
        """Appends an event to the file at once, so that no later event can be kept while this one is lost."""
        self.events.append(event)
        if self._storage.is_local:
            with Path(self._storage.path(LOG)).open("a") as file:
                file.write(sealed_json(event) + "\n")
        else:  # An object store cannot append; the log is short.
            self._storage.write(LOG, "".join(sealed_json(each) + "\n" for each in self.events).encode())

    def names(self, kind: str) -> list[str]:
        """Returns the trials that have an event of this kind, in order."""
        return list(dict.fromkeys(event["trial"] for event in self.events if event["event"] == kind))


def make_sampler(config: TuneConfig) -> BaseSampler:
    """Returns Optuna's sampler with the search's seed; TPE begins with a few random trials."""
    if config.search == "random":
        return RandomSampler(seed=config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=config.seed, n_startup_trials=_NUM_RANDOM, multivariate=True, group=True)


class Suggestions:
    """Optuna's sampler behind Ray's adapter; trials are known by their names.

    Args:
        config: The search.
        knobs: The space.
    """

    def __init__(self, config: TuneConfig, knobs: tuple[Knob, ...]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)

        def space(trial: optuna.Trial) -> dict[str, Any]:
            return {"knobs": draw(knobs, trial)}

        self._inner = OptunaSearch(
            space=space,  # pyright: ignore[reportArgumentType]
            metric="score",
            mode="max",
            sampler=make_sampler(config),
        )

    def suggest(self, trial: str) -> Values:
        """Returns the next values as JSON keeps them, so that those of a replayed search are equal."""
        with warnings.catch_warnings():
            # The first draw imports many modules, and Ray warns that training belongs elsewhere.
            warnings.filterwarnings("ignore", message="Define-by-run", category=UserWarning)
            suggested = self._inner.suggest(trial)
        assert suggested is not None
        return json.loads(json.dumps(suggested["knobs"]))

    def report(self, trial: str, rung: int, score: float) -> None:
        """Records an intermediate score of a trial."""
        self._inner.on_trial_result(trial, {"score": score, "training_iteration": rung})

    def complete(self, trial: str, score: float | None) -> None:
        """Records the final score of a trial; None where it died."""
        self._inner.on_trial_complete(trial, None if score is None else {"score": score}, error=score is None)


@dataclass
class Replay:
    """The results that a search had when it was interrupted.

    Attributes:
        known: Trial and rung of every result.
        steps: Optimiser steps of each trial.
    """

    known: set[tuple[str, int]] = field(default_factory=set)
    steps: dict[str, int] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Adds one more event."""
        if event["event"] == REPORT or (event["event"] == COMPLETE and event["score"] is not None):
            self.known.add((event["trial"], event["rung"]))
            self.steps[event["trial"]] = event["steps"]


class RecordedSearch(Searcher):
    """A searcher of Ray Tune: it suggests interrupted trials first, then new ones until the budget is spent.

    Args:
        config: The search.
        knobs: The space.
        log: Its events so far.

    Raises:
        ConfigError: The log belongs to another search.
    """

    def __init__(self, config: TuneConfig, knobs: tuple[Knob, ...], log: SearchLog) -> None:
        super().__init__(metric="score", mode="max")
        self._config, self._log = config, log
        self._inner = Suggestions(config, knobs)
        self._replay = Replay()
        self._knobs: dict[str, Values] = {}
        for event in log.events:
            self._replay_event(event)
        over = set(log.names(COMPLETE))
        self._waiting = [name for name in log.names(SUGGEST) if name not in over]
        self._names: dict[str, str] = {}

    def _replay_event(self, event: Event) -> None:
        name = event["trial"]
        if event["event"] == SUGGEST:
            self._knobs[name] = self._inner.suggest(name)
            if self._knobs[name] != event["knobs"]:
                raise ConfigError(
                    f"{self._config.out}: trial {name} would have other values now than in {LOG}, as by another "
                    "version of Optuna; give another out"
                )
        elif event["event"] == REPORT:
            self._inner.report(name, event["rung"], event["score"])
        else:
            self._inner.complete(name, event["score"])
        self._replay.take(event)

    def suggest(self, trial_id: str) -> Any:
        """Returns the config of the next trial, or `Searcher.FINISHED`."""
        spent = sum(self._replay.steps.values())
        if self._waiting:
            name = self._waiting.pop(0)
        elif len(self._knobs) >= self._config.num_trials or 0 < self._config.max_steps <= spent:
            return Searcher.FINISHED
        else:
            name = f"{len(self._knobs):03d}"
            self._knobs[name] = self._inner.suggest(name)
            self._log.write({"event": SUGGEST, "trial": name, "knobs": self._knobs[name]})
        self._names[trial_id] = name
        return {"trial": name, "knobs": self._knobs[name]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Records the score at a rung from which the trial may continue."""
        name, rung = self._names[trial_id], result["rung"]
        if (name, rung) in self._replay.known:
            return
        self._inner.report(name, rung, result["score"])
        self._write(REPORT, name, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Records the end of a trial."""
        name = self._names[trial_id]
        score = None if error or not result or "score" not in result else result["score"]
        self._inner.complete(name, score)
        self._write(COMPLETE, name, {} if score is None or result is None else result)

    def _write(self, kind: str, name: str, result: dict[str, Any]) -> None:
        event = {key: result.get(key) for key in ("rung", "score", "steps")}
        self._log.write({"event": kind, "trial": name, **event})
        self._replay.take(self._log.events[-1])

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the log holds the whole state."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: the log holds the whole state."""


class RecordedASHA(ASHAScheduler):
    """ASHA in the state of an interrupted search: milestones are the rungs; a repeated result gets its old answer.

    Args:
        config: The search.
        log: Its events so far.
    """

    def __init__(self, config: TuneConfig, log: SearchLog) -> None:
        super().__init__(
            time_attr="time",
            metric="score",
            mode="max",
            grace_period=1,
            max_t=rung_time(len(config.rungs), config),  # pyright: ignore[reportArgumentType]
            reduction_factor=config.reduction,
        )
        self._answers: dict[tuple[str, int], str] = {}
        for event in log.events:
            trial = SimpleNamespace(config={"trial": event["trial"]})
            result = event | {"time": rung_time(event["rung"], config) if event.get("rung") else None}
            if event["event"] == SUGGEST:
                self.on_trial_add(None, trial)
            elif event.get("score") is not None:
                self.on_trial_result(None, trial, result)
                if event["event"] == COMPLETE:
                    self.on_trial_complete(None, trial, result)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Adds a trial, or one that begins again."""
        super().on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decides whether a trial continues."""
        key = (_named(trial).trial_id, result["rung"])
        if key not in self._answers:
            self._answers[key] = super().on_trial_result(tune_controller, _named(trial), result)
        return self._answers[key]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Notes that a trial has ended."""
        super().on_trial_complete(tune_controller, _named(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Notes that a trial was removed before it began."""
        super().on_trial_remove(tune_controller, _named(trial))


def _named(trial: Any) -> Any:
    """Returns a stand-in whose id is the trial's name, since Ray draws new ids in every process."""
    return SimpleNamespace(trial_id=trial.config["trial"])


def population(config: TuneConfig, knobs: tuple[Knob, ...], log: SearchLog) -> dict[str, Values]:
    """Returns the members of a population with their current values."""
    inner = Suggestions(config, knobs)
    members = {}
    for index in range(config.num_trials):
        name = f"{index:03d}"
        values = inner.suggest(name)
        if name not in log.names(SUGGEST):
            log.write({"event": SUGGEST, "trial": name, "knobs": values})
        state = TrialState.load(trial_folder(config.out, name))
        members[name] = values if state is None else state.knobs
    return members
