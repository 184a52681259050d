"""The report's plots as inline SVG: drawn by matplotlib, coloured and set in type by the page's CSS.

Every plot is drawn in colours that stand for CSS variables, so that light and dark mode need one drawing. Text stays
text. A wide plot is drawn once for desktops and once for phones, and the page shows the one that fits.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter

from raywgen.evaluation.results import NoveltyRow

Series = Sequence[tuple[float, float]]

# Stand-ins that occur in no drawing by chance, and the CSS variables that replace them.
INK, MUTED, LINE, ACCENT, TINT, PAPER = "#010203", "#020304", "#030405", "#040506", "#050607", "#060708"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", TINT: "tint", PAPER: "paper"}

MARKERS = (("o", "●"), ("s", "■"), ("D", "◆"), ("^", "▲"), ("v", "▼"), ("P", "✚"))
"""Matplotlib's marker of each layout and the sign for it in text; they repeat after the last."""

WIDE, NARROW, PANEL = 820, 350, 400
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raywgen",
    "text.parse_math": False,
    "font.size": 12.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderRow:
    """One row of the ladder plot: accuracies in percent with half intervals and markers, and their mean."""

    label: str
    group: str
    is_generated: bool
    dots: tuple[tuple[float, float, str], ...]
    mean: float


def ladder_plot(rows: Sequence[LadderRow], limits: tuple[float, float], original: float | None, title: str) -> Markup:
    """Draws accuracies with confidence intervals, row by row; a dashed line marks networks trained on the task."""

    def draw(width: int) -> Figure:
        narrow = width == NARROW
        pitch, left, right = (50, 6, 46) if narrow else (36, 236, 54)
        positions = _positions(rows)
        height = pitch * (positions[-1] + 1) + 58
        figure, axes = new_axes(width, height, left=left, right=right, bottom=48, top=10)
        axes.set(xlim=limits, ylim=(positions[-1] + 0.5, -0.5), yticks=[], xlabel="balanced accuracy, %")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MultipleLocator(_tick_step(limits)))
        if original is not None:
            axes.axvline(original, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        inside = width - left - right
        edges = (-left / inside, 1 + right / inside)
        for row, position in zip(rows, positions, strict=True):
            _ladder_row(axes, row, position, edges, narrow)
        return figure

    return responsive(draw, title)


def accuracy_limits(lowest: float) -> tuple[float, float]:
    """Returns the ends of an axis of accuracies: a multiple of 5 with room below the lowest one, and 100 %.

    Args:
        lowest: The lowest accuracy, or end of an interval, that is drawn, in percent.
    """
    return max(0.0, 5 * math.floor(lowest / 5 - 0.2)), 100.0


def _positions(rows: Sequence[LadderRow]) -> list[float]:
    """Returns the vertical positions of the rows, with a gap between groups."""
    gaps = itertools.accumulate(0.4 * (row.group != before.group) for before, row in itertools.pairwise(rows))
    return [index + gap for index, gap in enumerate([0.0, *gaps])]


def _tick_step(limits: tuple[float, float]) -> float:
    span = limits[1] - limits[0]
    return 10 if span > 30 else 5 if span > 10 else 1


def _ladder_row(axes: Axes, row: LadderRow, position: float, edges: tuple[float, float], narrow: bool) -> None:
    """Draws one row; `edges` are the figure's left and right edge in units of the axes' width."""
    colour = ACCENT if row.is_generated else INK if row.group == "ladder" else MUTED
    weight = "bold" if row.is_generated else "normal"
    middle = position + 0.2 if narrow else position
    if row.is_generated:
        band = axes.axhspan(position - 0.48, position + 0.48, *edges, color=TINT, linewidth=0, zorder=0)
        band.set_clip_on(False)
    axes.axhline(middle, color=LINE, linewidth=1, zorder=1)
    spread = 0.2 if narrow else 0.3
    for index, (accuracy, interval, marker) in enumerate(row.dots):
        height = middle + spread * (index - (len(row.dots) - 1) / 2)
        # Accuracy lies in [0, 100], so the interval is cut there.
        low, high = max(0.0, accuracy - interval), min(100.0, accuracy + interval)
        axes.plot([low, high], [height, height], color=colour, linewidth=2, solid_capstyle="round", zorder=2)
        axes.plot(
            accuracy,
            height,
            marker=marker,
            markersize=8 if row.is_generated else 7,
            color=colour,
            markerfacecolor=PAPER if row.group == "ablation" else colour,
            markeredgecolor=colour if row.group == "ablation" else PAPER,
            markeredgewidth=1.5 if row.group == "ablation" else 1,
            zorder=3,
            clip_on=False,
        )
    place = axes.get_yaxis_transform()
    type_look: dict[str, Any] = {"transform": place, "va": "center", "color": colour, "fontweight": weight}
    if narrow:
        axes.text(0, position - 0.24, row.label, ha="left", **type_look)
    else:
        axes.text(-0.02, position, row.label, ha="right", **type_look)
    axes.text(edges[1] - 0.015, middle, f"{row.mean:.1f}", ha="right", **type_look)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of `curves_plot`: accuracies in percent, before training and after each epoch."""

    label: str
    values: tuple[float, ...]
    is_generated: bool


_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


def curves_plot(curves: Sequence[Curve], title: str) -> Markup:
    """Draws accuracy over epochs, a line for each start, named above the plot."""

    def draw(width: int) -> Figure:
        narrow = width == NARROW
        figure, axes = new_axes(width, 320 if narrow else 360, left=50, right=16, bottom=48, top=40 if narrow else 30)
        others = 0
        for curve in curves:
            colour, dash = (ACCENT, _DASHES[0]) if curve.is_generated else (INK, _DASHES[(1 + others) % len(_DASHES)])
            others += not curve.is_generated
            axes.plot(
                range(len(curve.values)),
                curve.values,
                color=colour,
                linestyle=dash,
                linewidth=2.4 if curve.is_generated else 1.6,
                marker="o" if len(curve.values) < 8 else "",
                markersize=5,
                label=curve.label,
            )
        axes.set(xlabel="epochs of training", ylabel="balanced accuracy, %")
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, integer=True))
        columns = 2 if narrow else 4
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.0}
        axes.legend(frameon=False, ncols=columns, handlelength=2.6, columnspacing=1.4, **place)
        return figure

    return responsive(draw, title)


NOVELTY_SIGNS = {"generated": "●", "original": "□", "noise": "✕"}
"""The kinds of networks in the novelty plot, in reading order, with the signs for them in text."""
_NOVELTY_LOOKS: dict[str, dict[str, Any]] = {
    "generated": {"marker": "o", "s": 36, "facecolor": ACCENT, "edgecolor": PAPER, "linewidth": 0.8},
    "original": {"marker": "s", "s": 30, "facecolor": PAPER, "edgecolor": INK, "linewidth": 1.1},
    "noise": {"marker": "x", "s": 28, "color": MUTED, "linewidth": 1.2},
}


def novelty_plot(points: Sequence[NoveltyRow], reference_distance: float, furthest: float, title: str) -> Markup:
    """Draws distance to the nearest stored network against overlap of errors; a copy lies at the upper left."""

    def draw(width: int) -> Figure:
        figure, axes = new_axes(width, 330 if width == NARROW else 420, left=52, right=14, bottom=50, top=30)
        axes.set(xlim=(0, 1.08 * furthest), ylim=(-0.02, 1.03))
        axes.set(xlabel="distance to the nearest stored network, in weights", ylabel="overlap of errors")
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(pad=9)
        axes.axvline(reference_distance, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        right_half = reference_distance > 0.55 * furthest
        axes.annotate(
            "reference distance",
            (reference_distance, 1.0),
            xytext=(4 if right_half else -4, 12),
            textcoords="offset points",
            ha="right" if right_half else "left",
            va="bottom",
            color=MUTED,
        )
        axes.plot(0, 1, marker="o", markersize=11, color="none", markeredgecolor=MUTED, clip_on=False)
        axes.annotate("a copy", (0, 1), xytext=(-5, 12), textcoords="offset points", va="bottom", color=MUTED)
        for kind, look in reversed(_NOVELTY_LOOKS.items()):
            chosen = [(point.weight_distance, point.error_overlap) for point in points if point.kind == kind]
            if chosen:
                axes.scatter(*zip(*chosen, strict=True), zorder=3, clip_on=False, **look)
        return figure

    return responsive(draw, title)


def loss_plot(train: Series, validation: Series, title: str) -> Markup:
    """Draws loss over steps, logarithmic where it spans more than a factor of 20."""
    figure, axes = new_axes(PANEL, 220, left=54, right=16, bottom=44, top=10)
    values = [value for _, value in (*train, *validation)]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for series, colour, width in ((train, MUTED, 1.4), (validation, ACCENT, 2.0)):
        if series:
            marker = "o" if len(series) == 1 else ""
            axes.plot(*zip(*thinned(series), strict=True), color=colour, linewidth=width, marker=marker, markersize=5)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set(xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    return svg(figure, title, "plot")


def codebook_plot(shares: Sequence[float], title: str) -> Markup:
    """Draws the share of each code of a level, the most used first; a dashed line marks even use."""
    figure, axes = new_axes(200, 130, left=8, right=8, bottom=26, top=8)
    ordered = sorted(shares, reverse=True)
    axes.fill_between(range(len(ordered)), ordered, step="mid", color=ACCENT, alpha=0.85, linewidth=0)
    axes.axhline(1 / len(ordered), color=INK, linewidth=1, linestyle=(0, (3, 3)))
    axes.set(xlim=(-0.5, len(ordered) - 0.5), yticks=[], xticks=[0, len(ordered) - 1])
    axes.set_ylim(0, max(1.1 * ordered[0], 1.5 / len(ordered)))
    axes.set_xticklabels(["1", f"{len(ordered)}"])
    axes.spines["left"].set_visible(False)
    return svg(figure, title, "plot")


def sparkline(series: Series) -> Markup:
    """Draws a line without axes, as tall as the text around it; written by hand because it has nothing to lay out."""
    points = thinned(series, most=60)
    low, high = (pick(value for _, value in points) for pick in (min, max))
    first, last = points[0][0], points[-1][0]
    bottom = 19 if high > low else 10
    path = " ".join(
        f"{1 + 88 * (step - first) / (last - first or 1):.1f},{bottom - 18 * (value - low) / (high - low or 1):.1f}"
        for step, value in points
    )
    return Markup(f'<svg class="spark" viewBox="0 0 90 20" aria-hidden="true"><polyline points="{path}"/></svg>')


def thinned(series: Series, most: int = 240) -> list[tuple[float, float]]:
    """Thins a series to at most `most` points, each the mean of its neighbours' steps and values."""
    size = math.ceil(len(series) / most)
    windows = (series[start : start + size] for start in range(0, len(series), size))
    return [(sum(s for s, _ in window) / len(window), sum(v for _, v in window) / len(window)) for window in windows]


def new_axes(width: float, height: float, *, left: int, right: int, bottom: int, top: int) -> tuple[Figure, Axes]:
    """Makes a figure of this size and these margins in CSS pixels."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
        axes.tick_params(length=4, pad=5)
    return figure, axes


def responsive(draw: Callable[[int], Figure], title: str) -> Markup:
    """Draws a plot twice, for desktops and for phones."""
    parts = []
    for width, css_class in ((WIDE, "plot wide"), (NARROW, "plot narrow")):
        with mpl.rc_context(_STYLE):
            parts.append(svg(draw(width), title, css_class))
    return Markup("").join(parts)


def svg(figure: Figure, title: str, css_class: str) -> Markup:
    """Returns a figure as an `<svg>` element without prologue, with unique ids and colours as CSS variables."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]+"', text)
    assert view_box is not None
    body = text[text.index("</metadata>") + len("</metadata>") :]
    # Of the title, too: two plots of one page may look alike.
    prefix = f"p{hashlib.sha256(f'{title}{body}'.encode()).hexdigest()[:8]}-"
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{prefix}", body)
    for stand_in, variable in _VARIABLES.items():
        body = body.replace(stand_in, f"var(--{variable})")
    label = escape(title)
    return Markup(f'<svg class="{css_class}" {view_box.group()} role="img" aria-label="{label}">{body}')
