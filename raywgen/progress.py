"""Progress of long steps in a terminal, or as plain lines where there is none."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Escapes a text for the console, so that it holds no markup, cursor movement or change of direction."""
    return escape(without_control(text))


def without_control(text: str) -> str:
    """Replaces control characters by their Python escapes; line ends stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def rates_text(perf: Mapping[str, float]) -> str:
    """Returns the figures of a metric log's `perf` as text: rates, utilisation, waiting for input, and memory."""
    shown = [
        f"{_short(perf[f'{name}_per_second'])} {name}/s"
        for name in ("values", "tokens")
        if f"{name}_per_second" in perf
    ]
    shown += [f"MFU {perf['mfu']:.0%}"] if "mfu" in perf else []
    shown += [f"{perf['input_wait']:.0%} waiting for input"] if "input_wait" in perf else []
    shown += [f"{perf['anon_gib']:.1f} GiB"] if "anon_gib" in perf else []
    shown += [f"{perf['gpu_peak_gib']:.1f} GiB of the GPU"] if "gpu_peak_gib" in perf else []
    return ", ".join(shown)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


class Bar:
    """The progress bar of one step."""

    def __init__(self, progress: Progress | None, console: Console, title: str) -> None:
        self._progress = progress
        self._console = console
        self._title = title
        self._task = progress.add_task(plain(title), total=None) if progress else None
        self._shown_at = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._part: str | int = ""

    def say(self, line: str) -> None:
        """Prints a line above the bar; it stays."""
        self._console.print(f"  {plain(line)}", highlight=False, soft_wrap=True)

    def update(self, done: int, total: int) -> None:
        """Shows that `done` of `total` are done, at what rate, and the estimated remaining time.

        Another total is that of other work, with a rate of its own.
        """
        self._begin(total)
        rate = self._rate(done)
        each = f", {_short(rate)}/s" if rate > 0 else ""
        self._show(f"{self._title}{each}", done, total, f"{done}/{total}{each}{self._left(done, total)}")

    def amount(self, done: int, total: int, unit: str, what: str = "") -> None:
        """Shows how much of a large amount is done, at what rate, what it holds, and the estimated remaining time."""
        rate = self._rate(done)
        each = f", {_short(rate)} {unit}/s" if rate > 0 else ""
        line = f"{_short(done)}/{_short(total)} {unit}{each}{f', {what}' if what else ''}"
        self._show(f"{self._title}: {line}", done, total, f"{line}{self._left(done, total)}")

    def _rate(self, done: int) -> float:
        """Returns the rate since the first update, 0 until there is one."""
        if self._first is None:
            return 0.0
        since, before = self._first
        return (done - before) / max(1e-9, time.monotonic() - since)

    def _left(self, done: int, total: int) -> str:
        """Returns the estimated remaining time as text; empty until there is a rate.

        The rate counts from the first update: work that an interrupted run did earlier says nothing about it.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        since, before = self._first
        if done >= total or done <= before:
            return ""
        seconds = (now - since) * (total - done) / (done - before)
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def named(self, done: int, total: int, what: str) -> None:
        """Shows what is under way, how much of all is done, and the estimated remaining time."""
        self._show(f"{self._title}: {what}", done, total, f"{what}{self._left(done, total)}")

    def training(self, run: str, stage: str, step: int, total: int, row: Mapping[str, Any]) -> None:
        """Shows a new row of a metric log, with the speed of its steps and the time left of its stage."""
        self._begin(f"{run} {stage}")  # The steps of another stage take another time.
        shown = [f"{name} {row[name]:.3f}" for name in ("loss", "val_accuracy", "accuracy", "snr_db") if name in row]
        what = f"{run.rstrip('/').rpartition('/')[2]} {stage} {step}/{total} {', '.join(shown[:2])}".rstrip()
        rates = rates_text(row.get("perf", {}))
        self._show(what, step, total, f"{what}{f'; {rates}' if rates else ''}{self._left(step, total)}")

    def _begin(self, part: str | int) -> None:
        """Forgets the rate of another part of the work."""
        if self._part == part:
            return
        self._part, self._first = part, None
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task)

    def _show(self, description: str, done: int, total: int, line: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=plain(description), completed=done, total=total)
        elif time.monotonic() - self._shown_at > _SECONDS_BETWEEN_LINES or done == total:
            self._shown_at = time.monotonic()
            self._console.print(f"  {plain(line)}", highlight=False, soft_wrap=True)


class Reporter:
    """Reports what a command is doing on standard error, so that standard output holds results only."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, emoji=False)

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[Bar]:
        """Shows a step with a progress bar, and prints its duration at the end."""
        begin = time.monotonic()
        self.console.print(f"[bold]{name}[/bold]: {plain(what)}", highlight=False, soft_wrap=True)
        if self.console.is_terminal:
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            columns = (TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), *times)
            with Progress(*columns, console=self.console, transient=True) as progress:
                yield Bar(progress, self.console, what)
        else:
            yield Bar(None, self.console, what)
        self.console.print(f"  done in {time.monotonic() - begin:.1f} s", highlight=False)
