"""The page on a search: the best trial, importance of the knobs, and all trials."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from raywgen.evaluation.report import REPORT
from raywgen.evaluation.report.folder import Command, Folder, command, opened
from raywgen.evaluation.report.rendering import write_page
from raywgen.locations import joined
from raywgen.stored_config import read_stored_config
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.importance import importance
from raywgen.tuning.live import final_rows, short_names, shown
from raywgen.tuning.plots import curve_plot, importance_plot, slice_plot
from raywgen.tuning.results import TABLE, TuneResult, best_row, read_table
from raywgen.tuning.space import Knob, parse_space

_BEST, _CONFIG = "best.yaml", "config.yaml"
_PERCENT = 100.0


def write_report(result: TuneResult, config: TuneConfig, knobs: Sequence[Knob]) -> str:
    """Writes `report.html` into the search's folder: best so far, importance, a plot of each knob, all trials."""
    with opened(result.out, _CONFIG) as folder:
        content = _content(folder, result, config, knobs)
        write_page(folder, REPORT, "tuning.html", content, package="raywgen.tuning")
    return joined(result.out, REPORT)


def redraw(location: str) -> str:
    """Writes the page on a search anew from what its folder holds.

    Raises:
        ConfigError: The folder holds no search, or a damaged one.
        TuneError: No trial has a score.
    """
    config = read_stored_config(TuneConfig, joined(location, _CONFIG))
    rows = read_table(location)
    result = TuneResult(out=location, rows=tuple(rows), best=best_row(rows), num_rungs=len(config.rungs))
    return write_report(result, config, parse_space(config.space))


def _content(folder: Folder, result: TuneResult, config: TuneConfig, knobs: Sequence[Knob]) -> dict[str, object]:
    """Returns the values of all variables of the template."""
    best, rows = result.best, result.rows
    names = short_names([knob.key for knob in knobs])
    weight = importance(rows, knobs)
    ordered = final_rows(rows, most=len(rows))
    ordered += [row for row in rows if row not in ordered]
    return {
        "kind": "Search over settings",
        "facts": _facts(result, config),
        "verdict": _verdict(result, names),
        "cards": [],
        "sections": {
            "search": "Search",
            "knobs": "Knobs",
            "trials": "Trials",
            "next": "What next",
            "files": "Files and settings",
        },
        "left_out": [],
        "best": best,
        "num_rungs": result.num_rungs,
        "curve": curve_plot(rows, result.num_rungs, "Accuracy of trials and the best so far over steps spent"),
        "importance": weight,
        "importance_plot": None
        if weight is None
        else importance_plot([(names[key], share) for key, share in weight.shares.items()], "Importance of each knob"),
        "conditional": [names[knob.key] for knob in knobs if knob.when],
        "slices": [
            {
                "name": names[knob.key],
                "key": knob.key,
                "when": {names[key]: ", ".join(map(str, values)) for key, values in knob.when.items()},
                "plot": slice_plot(rows, knob, best.trial, f"Accuracy over {knob.key}"),
            }
            for knob in knobs
        ],
        "names": names,
        "rows": [
            {
                "row": row,
                "percent": None if row.score is None else _PERCENT * row.score,
                "cells": [shown(row.knobs[key]) if key in row.knobs else "" for key in names],
            }
            for row in ordered
        ],
        "next": _next(folder, config),
        "places": [
            folder.place(name, path)
            for name, path in {
                "best settings": _BEST,
                "all trials": TABLE,
                "tensorboard": "tensorboard",
                "config": _CONFIG,
            }.items()
        ],
    }


def _facts(result: TuneResult, config: TuneConfig) -> list[str]:
    counts = {
        word: sum(row.status == word for row in result.rows) for word in ("done", "stopped", "failed", "unfinished")
    }
    facts = [config.search, f"scheduler {config.scheduler}"]
    facts += [f"{count} {word}" for word, count in counts.items() if count]
    return [*facts, f"{result.total_steps:,} optimiser steps"]


def _verdict(result: TuneResult, names: dict[str, str]) -> dict[str, object]:
    best = result.best
    assert best.score is not None
    values = ", ".join(f"{names[key]} {shown(value)}" for key, value in best.knobs.items())
    sentence = f"{_PERCENT * best.score:.1f} % accuracy on validation tasks with {values}."
    return {"label": f"Best: trial {best.trial}", "sentence": sentence, "is_good": True}


def _next(folder: Folder, config: TuneConfig) -> list[Command]:
    # With population-based training the number of trials is that of the population, which stays.
    more = [] if config.scheduler == "pbt" else [f"num_trials={2 * config.num_trials}"]
    curves = shlex.join(["tensorboard", "--logdir", folder.at("tensorboard")])
    return [
        command("Train with the best settings", "train", folder.at(_BEST)),
        command("Go on with the search", "tune", folder.at(_CONFIG), *more),
        Command(what="Compare all trials in a browser", line=curves),
        command("Draw this page again", "report", folder.location),
    ]
