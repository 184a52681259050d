"""The report of a search: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from raywgen.config import to_yaml
from raywgen.locations import joined
from raywgen.storage import Storage
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.importance import importance
from raywgen.tuning.live import final_rows, short_names, shown
from raywgen.tuning.plots import curve_plot, importance_plot, slice_plot
from raywgen.tuning.results import TABLE, TuneResult
from raywgen.tuning.space import Knob

REPORT = "report.html"
_PERCENT = 100.0


def write_report(result: TuneResult, config: TuneConfig, knobs: Sequence[Knob]) -> str:
    """Writes `report.html` into the search's folder: best so far, importance, a plot of each knob, all trials."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("raywgen.tuning", "."), PackageLoader("raywgen.evaluation", ".")]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    html = environment.get_template("tuning.html").render(**_content(result, config, knobs))
    Storage.at(result.out).write(REPORT, html.encode())
    return joined(result.out, REPORT)


def _content(result: TuneResult, config: TuneConfig, knobs: Sequence[Knob]) -> dict[str, object]:
    """Returns the values of all variables of the template."""
    best, rows = result.best, result.rows
    names = short_names([knob.key for knob in knobs])
    weight = importance(rows, knobs)
    ordered = final_rows(rows, most=len(rows))
    ordered += [row for row in rows if row not in ordered]
    assert best.score is not None
    return {
        "run": Path(Storage.at(result.out).root).resolve().name,
        "written": datetime.now().astimezone(),
        "best": best,
        "best_percent": _PERCENT * best.score,
        "best_knobs": {names[key]: shown(value) for key, value in best.knobs.items()},
        "config": config,
        "config_yaml": to_yaml(config),
        "counts": {
            word: sum(row.status == word for row in rows) for word in ("done", "stopped", "failed", "unfinished")
        },
        "total_steps": result.total_steps,
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
        "paths": {
            "best config": f"{result.out}/best.yaml",
            "all trials": f"{result.out}/{TABLE}",
            "TensorBoard": f"tensorboard --logdir {result.out}/tensorboard",
        },
    }
