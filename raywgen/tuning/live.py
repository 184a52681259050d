"""The table of a running search: in a terminal it is redrawn as trials progress, elsewhere each rung is a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.console import Console
from rich.live import Live
from rich.table import Table

from raywgen.progress import plain
from raywgen.training import read_metrics
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.results import TrialRow, TrialState, best_row, row_of, trial_folder
from raywgen.tuning.trial import run_folder

_MOST_ROWS = 24
_PERCENT = 100.0
_ANY_WIDTH = 10_000
_COLUMNS = ("trial", "rung", "accuracy", "status")


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shortens dotted keys to as many of their last parts as distinguish them."""
    names: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        names[key] = next(
            (tail for tail in tails if not any(other != key and f".{other}".endswith(f".{tail}") for other in keys)),
            key,
        )
    return names


def shown(value: object) -> str:
    """Formats a knob's value in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def trials_table(
    rows: Sequence[TrialRow], num_rungs: int, console: Console, now: Mapping[str, str] | None = None
) -> Table:
    """Returns a table of trials with their values and scores.

    All values share one column where the console is too narrow for a column of each knob.

    Args:
        rows: Trials in the order to show them.
        num_rungs: Rungs of a whole trial.
        console: Console that will show the table.
        now: Progress of running trials by name, shown in place of their status.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row.knobs))
    names = short_names(keys)
    wide = Table(*_COLUMNS, *(plain(names[key]) for key in keys))
    narrow = Table(*_COLUMNS, "values")
    best = best_row(rows) if any(row.score is not None for row in rows) else None
    for row in rows:
        score = "-" if row.score is None else f"{_PERCENT * row.score:.1f}"
        style = "bold green" if row is best else ""
        status = (now or {}).get(row.trial, row.status)
        rung = f"{row.scores[-1].rung if row.scores else 0}/{num_rungs}"
        cells = (row.trial, rung, score, plain(status))
        values = {key: plain(shown(row.knobs[key])) for key in keys if key in row.knobs}
        wide.add_row(*cells, *(values.get(key, "") for key in keys), style=style)
        joined = ", ".join(f"{plain(names[key])}={value}" for key, value in values.items())
        narrow.add_row(*cells, joined, style=style)
    # Rich cuts a measurement at the console's own width unless its options give a larger one.
    needed = console.measure(wide, options=console.options.update(width=_ANY_WIDTH)).maximum
    return wide if needed <= console.width else narrow


class LiveTable(Callback):
    """A table that follows Ray Tune's events.

    Args:
        settings: The search.
        console: Console to print to.
    """

    def __init__(self, settings: TuneConfig, console: Console) -> None:
        self._settings, self._console = settings, console
        self._live: Live | None = None
        self._over: set[str] = set()
        self._running: set[str] = set()
        self._names: list[str] = []
        self._printed: set[tuple[str, int, int]] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Returns nothing to pickle: Ray would keep a copy for its own way of resuming, which is not used."""
        return {}

    @contextmanager
    def shown(self, known: Mapping[str, bool]) -> Iterator[None]:
        """Shows the table while a search runs.

        Args:
            known: Trials of an earlier process, and whether they are over.
        """
        self._names, self._over = list(known), {name for name, is_over in known.items() if is_over}
        for row in self._rows():
            self._printed |= {(row.trial, 0, score.rung) for score in row.scores}
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, refresh_per_second=2, get_renderable=self._table, transient=True) as live:
            self._live = live
            yield

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Adds a trial whose process has started."""
        name = trial.config["trial"]
        self._running.add(name)
        if name not in self._names:
            self._names.append(name)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Prints the rung that a trial has reached."""
        if self._live is None:
            self._print_rung(trial.config["trial"])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Marks a trial as over."""
        self._end(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Marks a trial as over whose process died too often."""
        self._end(trial.config["trial"])

    def _end(self, name: str) -> None:
        self._running.discard(name)
        self._over.add(name)
        if self._live is None:
            (row,) = self._rows([name])
            if row.status in ("stopped", "failed"):
                self._console.print(
                    f"  trial {name}: {row.status} {row.reason}".rstrip(), highlight=False, markup=False, soft_wrap=True
                )

    def _print_rung(self, name: str) -> None:
        state = TrialState.load(trial_folder(self._settings.out, name))
        if state is None or not state.scores or state.failed:
            return
        score = state.scores[-1]
        if (key := (name, state.generation, score.rung)) in self._printed:
            return
        self._printed.add(key)
        short = short_names(list(state.knobs))
        values = ", ".join(f"{short[knob]}={shown(value)}" for knob, value in state.knobs.items())
        reached = f"{_PERCENT * score.score:.1f} at rung {score.rung} of {len(self._settings.rungs)}"
        self._console.print(f"  trial {name}: {reached} ({values})", highlight=False, markup=False, soft_wrap=True)

    def _rows(self, names: Sequence[str] | None = None) -> list[TrialRow]:
        rows = []
        for name in self._names if names is None else names:
            state = TrialState.load(trial_folder(self._settings.out, name)) or TrialState(trial=name, knobs={})
            rows.append(row_of(state, len(self._settings.rungs), name in self._over))
        return rows

    def _table(self) -> Table:
        rows = self._rows()
        now = {row.trial: self._doing(row) for row in rows if row.trial in self._running}
        under_way = [row for row in rows if row.trial in now]
        others = sorted((row for row in rows if row.trial not in now), key=lambda row: -(row.score or 0.0))
        table = trials_table([*under_way, *others][:_MOST_ROWS], len(self._settings.rungs), self._console, now)
        table.title = f"{len(self._over)} of {self._settings.num_trials} trials over, {len(under_way)} under way"
        return table

    def _doing(self, row: TrialRow) -> str:
        state = TrialState.load(trial_folder(self._settings.out, row.trial))
        metrics = read_metrics(run_folder(self._settings, state)) if state is not None else []
        return f"{metrics[-1]['stage']}, step {metrics[-1]['step'] + 1}" if metrics else "preparing"


def final_rows(rows: Sequence[TrialRow], most: int = 8) -> list[TrialRow]:
    """Returns the trials that were judged, those of the highest rung and score first."""
    judged = [row for row in rows if row.score is not None]
    ordered = sorted(judged, key=lambda row: (-row.scores[-1].rung, -row.scores[-1].score))
    return ordered[:most]
