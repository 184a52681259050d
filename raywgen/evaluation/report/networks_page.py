"""The page on generated networks: what was written, and how it does on its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from raywgen.corpus import Corpus
from raywgen.corpus.manifest import MANIFEST
from raywgen.evaluation.intervals import half_width
from raywgen.evaluation.report.folder import CONFIG, Command, Folder, Place, command, text_of
from raywgen.evaluation.report.inputs import ReportError, read_as
from raywgen.evaluation.report.plots import LadderRow, accuracy_limits, ladder_plot
from raywgen.evaluation.report.words import counted
from raywgen.generation.file_sink import INDEX
from raywgen.generation.plan import NetworkRow
from raywgen.generation.sinks import rows_of
from raywgen.tasks.standing import DOUBTFUL

_MOST_ROWS = 200
_SHARES = ("example_accuracy", "chance", "linear", "test_accuracy")


def of_files(folder: Folder) -> dict[str, object]:
    """Returns the content of the page on a folder of generated files."""
    return _content(folder, read_as(folder.root / INDEX, _rows, "generate"), folder.settings(), [INDEX, CONFIG])


def of_corpus(folder: Folder) -> dict[str, object]:
    """Returns the content of the page on a corpus of generated networks.

    Raises:
        ReportError: Its networks were not generated.
        CorpusError: It cannot be read.
    """
    corpus = Corpus.open(folder.location)
    recipe = corpus.manifest["recipe"]
    if "generated" not in recipe:
        raise ReportError(
            f"{folder.location} is a corpus that nobody generated; `raywgen corpus info` shows what it holds"
        )
    return _content(folder, rows_of(corpus), recipe["config"], [MANIFEST])


def _content(
    folder: Folder, rows: Sequence[NetworkRow], settings: Mapping[str, object], files: Sequence[str]
) -> dict[str, object]:
    judged = _judged(rows)
    parts = {
        "accuracy": ("Accuracy", bool(judged)),
        "networks": ("Networks", True),
        "next": ("What next", True),
        "files": ("Files and settings", True),
    }
    tasks = {row.task for row in rows if row.task}
    return {
        "kind": "Generated networks",
        "facts": [
            counted(len(rows), "network"),
            *sorted({row.network for row in rows}),
            *([counted(len(tasks), "task")] if tasks else []),
        ],
        "verdict": _verdict(rows, judged),
        "cards": _cards(rows, judged),
        "sections": {name: title for name, (title, is_there) in parts.items() if is_there},
        "left_out": [],
        "plot": _plot(rows, judged) if judged else None,
        "judged": judged,
        "rows": [(row, _file(folder, row)) for row in rows[:_MOST_ROWS]],
        "num_hidden": max(0, len(rows) - _MOST_ROWS),
        "next": _next(folder, rows, settings),
        "places": [folder.place(Path(name).stem, name) for name in files]
        + [folder.place(name, path) for name in ("generator", "corpus") if (path := text_of(settings, name))],
    }


def _rows(content: Any) -> list[NetworkRow]:
    """Takes the parsed file.

    Raises:
        TypeError, ValueError: A part is missing or of another type.
    """
    rows = [NetworkRow(**row) for row in content]
    if not rows:
        raise ValueError("it holds no network")
    for row in rows:
        if not all(isinstance(text, str) for text in (row.network, row.task, row.path)):
            raise TypeError(f"network {row.network!r} is not named by text")
        for value in (row.log_prob, row.example_loss, *(getattr(row, name) for name in _SHARES)):
            if not (value is None or isinstance(value, int | float)):
                raise TypeError(f"a figure of {row.network} is {value!r}, no number")
    return rows


def _judged(rows: Sequence[NetworkRow]) -> str:
    """Returns the accuracy that networks are judged by: on test samples if all have it, on their own, or none."""
    for name in ("test_accuracy", "example_accuracy"):
        if all(getattr(row, name) is not None for row in rows):
            return name
    return ""


def _verdict(rows: Sequence[NetworkRow], judged: str) -> dict[str, object]:
    if not judged:
        sentence = f"{counted(len(rows), 'network')} written; none was run, so nothing is known of what they do."
        return {"label": "Not tried", "sentence": sentence, "is_good": False}
    where = "test samples" if judged == "test_accuracy" else "the labelled samples that they were chosen by"
    sentence = f"{counted(len(rows), 'network')} score {_mean(rows, judged):.1f} % on {where}"
    chance = [row.chance for row in rows if row.chance is not None]
    sentence += f", where guessing would score {100 * fmean(chance):.1f} %" if len(chance) == len(rows) else ""
    doubtful = sum(row.against_chance in DOUBTFUL for row in rows)
    if doubtful:
        label = f"{doubtful} of {counted(len(rows), 'network')} no better than chance or a linear classifier"
        return {"label": label, "sentence": f"{sentence}.", "is_good": False}
    return {"label": "Better than chance" if chance else "Tried", "sentence": f"{sentence}.", "is_good": True}


def _cards(rows: Sequence[NetworkRow], judged: str) -> list[dict[str, object]]:
    """Returns the figures that the verdict rests on."""
    if not judged:
        return []
    titles = {
        "test_accuracy": ("On test samples", "nothing was chosen by them"),
        "example_accuracy": ("On labelled samples", "networks were chosen by them"),
        "linear": ("Linear classifier", "on each labelled sample, fitted to the others"),
        "chance": ("Guessing", "one over the number of classes"),
    }
    return [
        {
            "title": title,
            "value": f"{_mean(rows, name):.1f}",
            "unit": "%",
            "note": note,
            "accent": name == judged,
        }
        for name, (title, note) in titles.items()
        if all(getattr(row, name) is not None for row in rows)
    ]


def _mean(rows: Sequence[NetworkRow], name: str) -> float:
    return 100 * fmean(getattr(row, name) for row in rows)


def _plot(rows: Sequence[NetworkRow], judged: str) -> dict[str, object]:
    """Draws the mean accuracy of each architecture over its tasks, with its interval."""
    lines = []
    for name in dict.fromkeys(row.network for row in rows):
        shares = [100 * getattr(row, judged) for row in rows if row.network == name]
        interval = half_width(stdev(shares), len(shares)) if len(shares) > 1 else 0.0
        dots = ((fmean(shares), interval, "o"),)
        lines.append(LadderRow(label=name, group="ladder", is_generated=False, dots=dots, mean=fmean(shares)))
    chance = _mean(rows, "chance") if all(row.chance is not None for row in rows) else None
    title = "Balanced accuracy of each architecture, mean over its networks"
    lowest = min([line.mean - line.dots[0][1] for line in lines] + ([chance] if chance is not None else []))
    plot = ladder_plot(lines, accuracy_limits(lowest), chance, title)
    return {"title": title, "plot": plot, "has_chance": chance is not None}


def _file(folder: Folder, row: NetworkRow) -> Place:
    """Returns a network's file, or the folder of its files; it lies in this folder, wherever that was moved."""
    if not row.path:
        return Place(name=row.checkpoint_id, path="", link="")
    path = Path(row.path.partition("?")[0])
    name = path.name if (folder.root / path.name).exists() or not folder.storage.is_local else ""
    if path.name.endswith(".index.json"):
        name = path.parent.name
    return folder.place(name or path.name, name or row.path)


def _next(folder: Folder, rows: Sequence[NetworkRow], settings: Mapping[str, object]) -> list[Command]:
    corpus, generator = (text_of(settings, name) for name in ("corpus", "generator"))
    commands = []
    first, file = rows[0], _file(folder, rows[0]).name
    # Networks in several files and adapters are folders, which `raywgen score` does not read.
    is_one_file = file.endswith(".safetensors") and folder.storage.exists(file)
    if corpus and first.task and is_one_file and first.test_accuracy is not None:
        what = "Score one of the files, or one of your own, on a task"
        commands.append(command(what, "score", folder.at(file), "--corpus", corpus, "--task", first.task))
    if corpus and generator and first.test_accuracy is not None:
        pair = [f"generator={generator}", f"corpus={corpus}"]
        commands.append(command("Set them beside baselines", "evaluate", *pair, f"out={folder.at('evaluation')}"))
    return [*commands, command("Draw this page again", "report", folder.location)]
