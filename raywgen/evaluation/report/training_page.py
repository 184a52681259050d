"""The page on a run of training: how far it is, and the loss of each stage."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from raywgen.config import ConfigError
from raywgen.evaluation.report.folder import CONFIG, Command, Folder, Place, command, text_of
from raywgen.evaluation.report.inputs import StageLog, read_metrics, read_tokenizer
from raywgen.evaluation.report.plots import loss_plot, sparkline
from raywgen.evaluation.report.tokens import tokenizer_part
from raywgen.evaluation.report.words import listed
from raywgen.evaluation.tokenizer_report import TOKENIZER
from raywgen.training.run_folder import BUNDLE
from raywgen.training.runlog import METRICS, TENSORBOARD
from raywgen.training.status import RunStatus, run_status

_LOSSES = ("loss", "val_loss")
_SECONDS_PER_MINUTE = 60.0
_RISE = 1.01
"""A validation loss that ends higher than its lowest value by this factor has risen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPart:
    """The part of a page on metric logs.

    Attributes:
        logs: The scalars of each stage.
        stages: The same for the template: findings, plots, first and last values.
        num_unreadable: Lines of the logs that cannot be read.
    """

    logs: list[StageLog]
    stages: list[dict[str, object]]
    num_unreadable: int


def content(folder: Folder) -> dict[str, object]:
    """Returns the content of the page on a run folder."""
    part = training_part(folder)
    tokenizer = read_tokenizer(folder.root / TOKENIZER) if folder.holds(TOKENIZER) else None
    parts = {
        "training": ("Stages", bool(part.logs)),
        "tokeniser": ("Tokeniser", tokenizer is not None),
        "next": ("What next", True),
        "files": ("Files and settings", True),
    }
    status = None
    with suppress(ConfigError):  # Without config or stages the page has the curves alone.
        status = run_status(folder.location)
    return {
        "kind": "Training of a generator",
        "facts": _facts(status, part.logs),
        "verdict": _verdict(status, part.logs) if status else None,
        "cards": [_card(log) for log in part.logs],
        "sections": {name: title for name, (title, is_there) in parts.items() if is_there},
        "left_out": [],
        "training": part,
        "tokenizer": tokenizer_part(tokenizer) if tokenizer else None,
        "codebook": None,
        "next": _next(folder, status),
        "places": _places(folder),
    }


def training_part(folder: Folder) -> TrainingPart:
    """Reads all metric logs in a folder and below it."""
    logs, num_unreadable = [], 0
    for file in folder.files(METRICS):
        found, unreadable = read_metrics(file, run=str(file.parent.relative_to(folder.root)))
        logs += found
        num_unreadable += unreadable
    return TrainingPart(logs=logs, stages=[_stage(log) for log in logs], num_unreadable=num_unreadable)


def _facts(status: RunStatus | None, logs: Sequence[StageLog]) -> list[str]:
    facts = [status.method] if status else []
    minutes = max((log.seconds for log in logs), default=0.0) / _SECONDS_PER_MINUTE
    return [*facts, f"{minutes:.1f} minutes"]


def _verdict(status: RunStatus, logs: Sequence[StageLog]) -> dict[str, object] | None:
    if not status.done:
        where = (
            f"at stage {status.stage}, step {status.step:,} of {status.num_steps:,}" if status.stage else "at its start"
        )
        sentence = f"The run was {where} when this page was written; the same command goes on with it."
        return {"label": "Not done", "sentence": sentence, "is_good": False}
    names = [log.stage for log in logs]
    sentence = f"The generator is written; its stage{'s' * (len(names) > 1)} {listed(names)} went to the end."
    if risen := [log.stage for log in logs if _has_risen(log)]:
        sentence += (
            f" The validation loss of {listed(risen)} rose again after its lowest: fewer steps or more networks may "
            "serve it better."
        )
    return {"label": "Trained", "sentence": sentence, "is_good": not risen}


def _has_risen(log: StageLog) -> bool:
    values = [value for _, value in log.scalars.get("val_loss", ())]
    return len(values) >= 3 and 0 < _RISE * min(values) < values[-1]


def _card(log: StageLog) -> dict[str, object]:
    name = "val_loss" if log.scalars.get("val_loss") else "loss"
    series = log.scalars.get(name, ())
    what = {"val_loss": "validation loss", "loss": "loss"}[name]
    return {
        "title": log.stage,
        "value": f"{series[-1][1]:.3g}" if series else "-",
        "unit": "",
        "note": f"{what} after {log.last_step + 1:,.0f} steps",
        "accent": False,
    }


def _stage(log: StageLog) -> dict[str, object]:
    train, validation = (log.scalars.get(name, ()) for name in _LOSSES)
    title = _loss_finding(train, validation)
    others = [
        {"name": name, "last": series[-1][1], "first": series[0][1], "line": sparkline(series)}
        for name, series in log.scalars.items()
        if name not in _LOSSES
    ]
    return {
        "run": log.run,
        "stage": log.stage,
        "title": title,
        "plot": loss_plot(train, validation, f"{log.stage}: {title}") if train or validation else None,
        "train": train[-1][1] if train else None,
        "validation": validation[-1][1] if validation else None,
        "others": others,
    }


def _loss_finding(train: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]]) -> str:
    series, name = (validation, "validation loss") if validation else (train, "loss")
    if not series:
        return "no loss logged"
    last_step, last = series[-1]
    best_step, best = min(series, key=lambda pair: pair[1])
    if not validation or len(validation) < 3:
        return f"{name} {last:.3g} at step {last_step:,.0f}"
    if best_step >= 0.95 * last_step:
        return f"{name} lowest at the end, {best:.3g}"
    rise = f", {100 * (last / best - 1):.0f} % higher at the end" if best > 0 and last > _RISE * best else ""
    return f"{name} lowest at step {best_step:,.0f}, {best:.3g}{rise}"


def _next(folder: Folder, status: RunStatus | None) -> list[Command]:
    run, corpus = folder.location, text_of(folder.settings(), "corpus")
    curves = Command(what="Follow all curves in a browser", line=shlex.join(["tensorboard", "--logdir", run]))
    again = command("Draw this page again", "report", run)
    if status is None:
        return [again]
    if not status.done:
        go_on = command("Go on with the run", "train", folder.at(CONFIG))
        return [go_on, command("See how far it is", "status", run), curves, again]
    pair = [f"generator={run}", *([f"corpus={corpus}"] if corpus else [])]
    return [
        command("Score it beside baselines", "evaluate", *pair, f"out={folder.at('evaluation')}"),
        command(
            "Write networks for tasks that it never saw",
            "generate",
            *pair,
            "tasks=unseen",
            f"out={folder.at('networks')}",
        ),
        curves,
        again,
    ]


def _places(folder: Folder) -> list[Place]:
    names = {"generator": BUNDLE, "tensorboard": TENSORBOARD, "config": CONFIG}
    places = [folder.place(name, path) for name, path in names.items() if folder.storage.exists(path)]
    if corpus := text_of(folder.settings(), "corpus"):
        places.append(folder.place("corpus", corpus))
    return places + [folder.place("metrics", str(path.relative_to(folder.root))) for path in folder.files(METRICS)]
