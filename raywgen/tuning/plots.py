"""The plots of a search's report, in the style of the evaluation's.

`optuna.visualization.matplotlib` has plots of the same names. They count trials where these count optimiser steps (a
trial that ASHA stops costs a fraction of a whole one), do not mark stopped trials, and set the style of
pyplot for the whole process; so these stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from raywgen.evaluation.report.plots import ACCENT, INK, LINE, MUTED, NARROW, PAPER, new_axes, responsive, svg
from raywgen.tuning.results import TrialRow
from raywgen.tuning.space import Knob

_PERCENT = 100.0
_MOST_CHARACTERS = 9
_MARGIN = 0.08


def best_so_far(rows: Sequence[TrialRow], num_rungs: int) -> list[tuple[float, float]]:
    """Returns, trial by trial, the optimiser steps spent so far and the best score at the last rung so far."""
    curve, spent, best = [], 0, None
    for row in rows:
        spent += row.steps
        score = row.score_at(num_rungs) if row.score is not None else None
        if score is not None and (best is None or score > best):
            best = score
        if best is not None:
            curve.append((float(spent), best))
    return curve


def curve_plot(rows: Sequence[TrialRow], num_rungs: int, title: str) -> Markup:
    """Draws every trial as a dot, filled where it reached the last rung, and the best so far as a line."""

    def draw(width: int) -> Figure:
        narrow = width == NARROW
        figure, axes = new_axes(width, 260 if narrow else 320, left=48, right=14, bottom=46, top=12)
        spent = 0
        for row in rows:
            spent += row.steps
            if row.score is not None:
                whole = row.status == "done"
                axes.plot(spent, _PERCENT * row.score, color=MUTED, **_dot(whole, MUTED))
        curve = best_so_far(rows, num_rungs)
        if curve:
            steps, scores = zip(*curve, strict=True)
            axes.step(steps, [_PERCENT * score for score in scores], where="post", color=ACCENT, linewidth=2)
        axes.set(xlabel="optimiser steps of all trials so far", ylabel="accuracy, %")
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        return figure

    return responsive(draw, title)


def slice_plot(rows: Sequence[TrialRow], knob: Knob, best: str, title: str) -> Markup:
    """Draws scores over the values of one knob, with the best trial in colour."""
    figure, axes = new_axes(400, 220, left=48, right=16, bottom=46, top=10)
    for row in rows:
        if row.score is None or knob.key not in row.knobs:
            continue
        value = row.knobs[knob.key]
        place = knob.choices.index(value) if knob.kind == "choice" else value
        colour = ACCENT if row.trial == best else INK
        axes.plot(place, _PERCENT * row.score, color=colour, zorder=3, **_dot(row.status == "done", colour))
    _scale(axes, knob)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return svg(figure, title, "plot")


def importance_plot(shares: Sequence[tuple[str, float]], title: str) -> Markup:
    """Draws one bar for each knob."""

    def draw(width: int) -> Figure:
        narrow = width == NARROW
        pitch, left = (44, 8) if narrow else (30, 250)
        figure, axes = new_axes(width, pitch * len(shares) + 16, left=left, right=52, bottom=8, top=8)
        axes.set(xlim=(0, 1), ylim=(len(shares) - 0.5, -0.5), xticks=[], yticks=[])
        for spine in ("left", "bottom"):
            axes.spines[spine].set_visible(False)
        for place, (name, share) in enumerate(shares):
            middle = place + 0.2 if narrow else place
            axes.barh(middle, 1, height=0.26 if narrow else 0.4, color=LINE)
            axes.barh(middle, share, height=0.26 if narrow else 0.4, color=ACCENT)
            axes.text(1.015, middle, f"{_PERCENT * share:.0f} %", va="center", color=INK)
            where = (0, place - 0.22, "left") if narrow else (-0.02, place, "right")
            axes.text(where[0], where[1], name, va="center", ha=where[2], color=INK)
        return figure

    return responsive(draw, title)


def _dot(filled: bool, colour: str) -> dict[str, Any]:
    return {
        "marker": "o",
        "markersize": 6,
        "linestyle": "none",
        "markerfacecolor": colour if filled else PAPER,
        "markeredgecolor": colour,
        "clip_on": False,
    }


def _scale(axes: Axes, knob: Knob) -> None:
    if knob.kind == "choice":
        names = [_short(value) for value in knob.choices]
        axes.set(xlim=(-0.5, len(names) - 0.5))
        axes.set_xticks(range(len(names)), names)
        return
    if knob.kind == "loguniform":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        edge = (knob.high / knob.low) ** _MARGIN
        axes.set(xlim=(knob.low / edge, knob.high * edge))
        return
    edge = _MARGIN * (knob.high - knob.low)
    axes.set(xlim=(knob.low - edge, knob.high + edge))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=knob.kind == "int"))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
