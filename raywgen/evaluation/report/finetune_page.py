"""The page on fine-tuning: how fast networks from several starts get to an accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from raywgen.evaluation.finetune import RESULT, FineTuningRow
from raywgen.evaluation.report.folder import CONFIG, Command, Folder, command, text_of
from raywgen.evaluation.report.inputs import read_as
from raywgen.evaluation.report.plots import Curve, curves_plot
from raywgen.evaluation.report.words import counted, listed
from raywgen.evaluation.results import is_finite_number

_EPOCHS = (0, 1, 5, 25)
"""Epochs of the table's columns, besides the last."""


def content(folder: Folder) -> dict[str, object]:
    """Returns the content of the page on the folder of a fine-tuning."""
    rows = read_as(folder.root / RESULT, _rows, "finetune")
    settings = folder.settings()
    starts = list(dict.fromkeys(row.start for row in rows))
    last = len(rows[0].accuracy) - 1
    epochs = sorted({epoch for epoch in (*_EPOCHS, last) if epoch <= last})
    return {
        "kind": "Fine-tuning from several starts",
        "facts": [
            f"tasks {text_of(settings, 'tasks')}" if settings else "",
            counted(last, "epoch"),
            counted(len(rows[0].tasks), "task"),
        ],
        "verdict": _verdict(rows, starts, last),
        "cards": [_card(start, [row for row in rows if row.start == start], last) for start in starts],
        "sections": {"accuracy": "Accuracy", "next": "What next", "files": "Files and settings"},
        "left_out": [],
        "networks": [_network(name, rows, starts) for name in dict.fromkeys(row.network for row in rows)],
        "epochs": epochs,
        "rows": [(row, _label(row.start)) for row in rows],
        "next": _next(folder, settings),
        "places": [folder.place("curves", RESULT), folder.place("config", CONFIG)]
        + [folder.place(name, path) for name in ("generator", "corpus") if (path := text_of(settings, name))],
    }


def _rows(content: Any) -> list[FineTuningRow]:
    """Takes the parsed file.

    Raises:
        TypeError, ValueError: A part is missing, or no share.
    """
    rows = [FineTuningRow(**row) for row in content]
    if not rows:
        raise ValueError("it holds no row")
    for row in rows:
        shares = [*row.accuracy, row.wanted_accuracy, row.share_reached]
        if not row.accuracy or not all(is_finite_number(share) and 0 <= share <= 1 for share in shares):
            raise ValueError(f"the accuracies of {row.network}, {row.start} are not shares between 0 and 1")
        if not is_finite_number(row.learning_rate) or not (row.epochs is None or is_finite_number(row.epochs)):
            raise ValueError(f"the epochs or the learning rate of {row.network}, {row.start} are no number")
    if len({len(row.accuracy) for row in rows}) > 1:
        raise ValueError("its rows have different numbers of epochs")
    return rows


def _label(start: str) -> str:
    return Path(start).name


def _verdict(rows: Sequence[FineTuningRow], starts: Sequence[str], last: int) -> dict[str, object]:
    """Says which starts are the most accurate before training, and how all stand at the end."""
    before, after = ({start: _shown(rows, start, epoch) for start in starts} for epoch in (0, last))
    first = [_label(start) for start in starts if before[start] == max(before.values())]
    label = f"Ahead before training: {listed(first)}" if len(first) < len(starts) else "All begin alike"
    if len(starts) == 1:
        label = f"From {first[0]} alone"
    sentence = f"Before training, {_standing(before)}; after {counted(last, 'epoch')}, {_standing(after)}."
    return {"label": label, "sentence": sentence, "is_good": True}


def _shown(rows: Sequence[FineTuningRow], start: str, epoch: int) -> float:
    """Returns the accuracy as it is shown: in percent, to one decimal, mean over architectures."""
    return round(100 * fmean(row.accuracy[epoch] for row in rows if row.start == start), 1)


def _standing(accuracy: Mapping[str, float]) -> str:
    return listed([f"{_label(start)} {value:.1f} %" for start, value in accuracy.items()])


def _card(start: str, rows: Sequence[FineTuningRow], last: int) -> dict[str, object]:
    epochs = [row.epochs for row in rows if row.epochs is not None]
    wanted = fmean(row.wanted_accuracy for row in rows)
    is_reached = len(epochs) == len(rows)
    reached = f"to {100 * wanted:.1f} %, median over tasks" if is_reached else f"to {100 * wanted:.1f} % within {last}"
    return {
        "title": _label(start),
        "value": f"{fmean(epochs):.0f}" if is_reached else "never",
        "unit": counted(fmean(epochs), "epoch").partition(" ")[2] if is_reached else "",
        "note": reached,
        "accent": start == "generated",
    }


def _network(name: str, rows: Sequence[FineTuningRow], starts: Sequence[str]) -> dict[str, object]:
    curves = [
        Curve(
            label=_label(row.start),
            values=tuple(100 * share for share in row.accuracy),
            is_generated=row.start == "generated",
        )
        for row in rows
        if row.network == name
    ]
    title = f"{name}: balanced accuracy after each epoch from {len(starts)} start{'s' * (len(starts) > 1)}"
    return {"title": title, "plot": curves_plot(curves, title)}


def _next(folder: Folder, settings: Mapping[str, object]) -> list[Command]:
    given = {name: text_of(settings, name) for name in ("generator", "corpus", "tasks")}
    pair = [f"{name}={path}" for name, path in given.items() if path]
    longer = folder.at("longer")
    return [
        *([command("Train longer", "finetune", *pair, "epochs=100", f"out={longer}")] if settings else []),
        command("Draw this page again", "report", folder.location),
    ]
