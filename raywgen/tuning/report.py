"""The page on a search: the best trial, importance of the knobs, and all trials."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from raywgen.evaluation.report import Page
from raywgen.evaluation.report.folder import CONFIG, Command, Folder, command
from raywgen.locations import joined
from raywgen.stored_config import read_stored_config
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.importance import importance
from raywgen.tuning.live import final_rows, short_names, shown
from raywgen.tuning.plots import curve_plot, importance_plot, slice_plot
from raywgen.tuning.results import TABLE, TuneResult, best_row, read_table
from raywgen.tuning.space import Knob, parse_space

_BEST = "best.yaml"
_PERCENT = 100.0


def content(folder: Folder) -> dict[str, object]:
    """Returns the values of all variables of the template, from the table and the config in a search's folder.

    Raises:
        ConfigError: The folder holds no search, or a damaged one.
        TuneError: No trial has a score.
    """
    config = read_stored_config(TuneConfig, joined(folder.location, CONFIG))
    rows = read_table(folder.location)
    result = TuneResult(out=folder.location, rows=tuple(rows), best=best_row(rows), num_rungs=len(config.rungs))
    return _content(folder, result, config, parse_space(config.space))


PAGES: Mapping[str, Page] = {TABLE: Page("tuning.html", content, "raywgen.tuning", (CONFIG,))}
"""The page on a search, by the file that makes a folder one; see `raywgen.evaluation.report.write_report`."""


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
                "config": CONFIG,
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
        command("Go on with the search", "tune", folder.at(CONFIG), *more),
        Command(what="Compare all trials in a browser", line=curves),
        command("Draw this page again", "report", folder.location),
    ]
