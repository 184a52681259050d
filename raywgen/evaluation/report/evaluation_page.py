"""The page on an evaluation: how generated networks stand, and what that rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median_low

from raywgen.evaluation.headline import Figure, Headline, best_baseline, cells_of, compare, figure, headline, lower
from raywgen.evaluation.report.folder import CONFIG, Command, Folder, Place, command, text_of
from raywgen.evaluation.report.inputs import read_evaluation
from raywgen.evaluation.report.plots import (
    MARKERS,
    NOVELTY_SIGNS,
    LadderRow,
    accuracy_limits,
    ladder_plot,
    novelty_plot,
)
from raywgen.evaluation.report.tokens import codebook_part, tokenizer_part
from raywgen.evaluation.report.training_page import training_part
from raywgen.evaluation.results import EVALUATION, GROUPS, SPLITS, Evaluation, NoveltyRow
from raywgen.training.runlog import METRICS

_GROUP_TITLES = {
    "ladder": "Ladder",
    "baseline": "Baselines with the same budget",
    "finetuned": "Other starts, fine-tuned on all images",
    "ablation": "Ablations",
}


def of_run(folder: Folder) -> dict[str, object]:
    """Returns the content of the page on a run folder with an evaluation below it."""
    return _content(folder, "evaluation/")


def of_evaluation(folder: Folder) -> dict[str, object]:
    """Returns the content of the page on the folder of an evaluation alone."""
    return _content(folder, "")


def _content(folder: Folder, below: str) -> dict[str, object]:
    evaluation = read_evaluation(folder.root / f"{below}{EVALUATION}")
    markers = _markers(evaluation)
    training = training_part(folder)
    splits = [split for split in SPLITS if _has(evaluation, split)]
    parts = {
        "accuracy": ("Accuracy", bool(splits)),
        "novelty": ("Novelty", evaluation.novelty is not None),
        "checks": ("Checks", bool(evaluation.claims)),
        "training": ("Training", bool(training.logs)),
        "tokeniser": ("Tokeniser", evaluation.tokenizer is not None or evaluation.codebook is not None),
        "next": ("What next", True),
        "files": ("Files and settings", True),
    }
    found = headline(evaluation)
    return {
        "kind": "Evaluation of a generator",
        "facts": _facts(evaluation),
        "verdict": found and {"label": found.label, "sentence": found.sentence, "is_good": found.is_good},
        "cards": _cards(evaluation, found) if found else [],
        "sections": {name: title for name, (title, is_there) in parts.items() if is_there},
        "left_out": [title.lower() for title, is_there in parts.values() if not is_there],
        "evaluation": evaluation,
        "ladders": [_ladder(evaluation, split, markers) for split in splits],
        "signs": [(sign, layout) for layout, (_, sign) in markers.items()],
        "groups": _table(evaluation, splits),
        "splits": splits,
        "num_networks": sorted({cell.num_networks for cell in evaluation.ladder}),
        "novelty": [_novelty(evaluation, split) for split in SPLITS if _novelty_rows(evaluation, split)],
        "tokenizer": tokenizer_part(evaluation.tokenizer) if evaluation.tokenizer else None,
        "codebook": codebook_part(evaluation.codebook) if evaluation.codebook else None,
        "next": _next(folder, below),
        "places": _places(folder, evaluation, below),
        "training": training,
    }


def _facts(evaluation: Evaluation) -> list[str]:
    facts = list(evaluation.layouts)
    if evaluation.num_test_images:
        facts.append(f"{evaluation.num_test_images:,} test images")
    if evaluation.num_samples:
        facts.append(f"{evaluation.num_samples} labelled samples as condition")
    if evaluation.best_of:
        facts.append(f"best of {evaluation.best_of}")
    if evaluation.minutes is not None:
        facts.append(f"{evaluation.minutes:.1f} minutes")
    return facts


def _markers(evaluation: Evaluation) -> dict[str, tuple[str, str]]:
    """Returns the marker of each layout in plots and the sign for it in text."""
    return {layout: MARKERS[index % len(MARKERS)] for index, layout in enumerate(evaluation.layouts)}


def _has(evaluation: Evaluation, split: str) -> bool:
    return any(cell.split == split for cell in evaluation.ladder)


def _cards(evaluation: Evaluation, found: Headline) -> list[dict[str, object]]:
    """Returns the figures that the headline rests on, and what training on the tasks would give."""
    best_of = f", best of {evaluation.best_of}" if evaluation.best_of else ""
    cards = [_card("Generated", found.generated, f"{found.split} tasks{best_of}", accent=True)]
    if found.baseline:
        row, other = found.baseline
        cards.append(_card("Best baseline", other, row.label))
    if found.original:
        cards.append(_card("Trained on the task", found.original, "no generator saw these networks"))
    return cards


def _card(title: str, shown: Figure, note: str, accent: bool = False) -> dict[str, object]:
    value, unit = f"{shown.accuracy:.1f}", f"± {shown.interval:.1f} %"
    return {"title": title, "value": value, "unit": unit, "note": note, "accent": accent}


def _ladder(evaluation: Evaluation, split: str, markers: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    rows = [
        LadderRow(
            label=row.label,
            group=row.group,
            is_generated=row.name == "generated",
            dots=tuple((100 * cell.accuracy, 100 * cell.ci95, markers[cell.layout][0]) for cell in cells),
            mean=100 * fmean(cell.accuracy for cell in cells),
        )
        for group in GROUPS
        for row in evaluation.rows
        if row.group == group and (cells := cells_of(evaluation, split, row.name))
    ]
    original = figure(cells_of(evaluation, split, "original"))
    title = _ladder_finding(evaluation, split)
    lowest = min(cell.accuracy - cell.ci95 for cell in evaluation.ladder)
    limits = accuracy_limits(100 * lowest)
    return {"title": title, "plot": ladder_plot(rows, limits, original.accuracy if original else None, title)}


def _ladder_finding(evaluation: Evaluation, split: str) -> str:
    generated = figure(cells_of(evaluation, split, "generated"))
    if generated is None:
        return f"Accuracy on {split} tasks"
    text = f"On {split} tasks, generated networks reach {generated.accuracy:.1f}"
    if baseline := best_baseline(evaluation, split):
        row, other = baseline
        text += f", {compare(generated, other)} the best baseline ({lower(row.label)}, {other.accuracy:.1f})"
    if original := figure(cells_of(evaluation, split, "original")):
        text += f" and {compare(generated, original)} trained ones ({original.accuracy:.1f})"
    return text


def _table(evaluation: Evaluation, splits: list[str]) -> list[dict[str, object]]:
    """Returns the rows of the table by group, each with its cells by split and layout."""
    cells = {(cell.row, cell.split, cell.layout): cell for cell in evaluation.ladder}
    columns = [(split, layout) for split in splits for layout in evaluation.layouts]
    groups = [
        {
            "title": _GROUP_TITLES[group],
            "rows": [
                {"row": row, "cells": [cells.get((row.name, *column)) for column in columns]}
                for row in evaluation.rows
                if row.group == group
            ],
        }
        for group in GROUPS
    ]
    return [group for group in groups if group["rows"]]


def _novelty_rows(evaluation: Evaluation, split: str) -> list[NoveltyRow]:
    return [point for point in evaluation.novelty.rows if point.split == split] if evaluation.novelty else []


def _novelty(evaluation: Evaluation, split: str) -> dict[str, object]:
    assert evaluation.novelty is not None
    reference_distance = evaluation.novelty.reference_distance
    # One axis for both splits, so that they can be compared.
    furthest = max([reference_distance, *(point.weight_distance for point in evaluation.novelty.rows)])
    networks = _novelty_rows(evaluation, split)
    labels = {row.name: row.label for row in evaluation.rows}
    medians = {}
    for kind, sign in NOVELTY_SIGNS.items():
        chosen = [point for point in networks if point.kind == kind]
        if chosen:
            medians[kind] = {
                "sign": sign,
                "title": labels[kind],
                "num": len(chosen),
                "distance": median_low(point.weight_distance for point in chosen),
                "overlap": median_low(point.error_overlap for point in chosen),
            }
    title = f"On {split} tasks, distance to the nearest stored network"
    if (generated := medians.get("generated")) and reference_distance:
        title = (
            f"On {split} tasks, generated networks lie {generated['distance'] / reference_distance:.2f} times the "
            f"reference distance from the nearest stored network; their errors overlap by "
            f"{100 * generated['overlap']:.0f} %"
        )
    return {"title": title, "plot": novelty_plot(networks, reference_distance, furthest, title), "medians": medians}


def _inputs(folder: Folder, below: str) -> dict[str, str]:
    """Returns where generator and corpus lie, as the user would give them; empty where nothing says so."""
    settings = folder.settings(f"{below}{CONFIG}")
    given = {name: text_of(settings, name) for name in ("generator", "corpus")}
    # The demo's lie in its own folder, wherever that was moved.
    return {name: folder.at(Path(path).name) if folder.lies_in(path) else path for name, path in given.items()}


def _next(folder: Folder, below: str) -> list[Command]:
    where, again = _inputs(folder, below), command("Draw this page again", "report", folder.location)
    if not all(where.values()):
        return [again]
    pair = [f"{name}={path}" for name, path in where.items()]
    networks, tuned, larger = (f"out={folder.at(name)}" for name in ("more-networks", "finetune", "best-of-32"))
    return [
        command("Write networks for tasks that it never saw", "generate", *pair, "tasks=unseen", networks),
        command("Train them on, beside other starts", "finetune", *pair, "tasks=unseen", tuned),
        command("Measure again with a larger budget", "evaluate", *pair, "best_of=32", larger),
        again,
    ]


def _places(folder: Folder, evaluation: Evaluation, below: str) -> list[Place]:
    """Lists where files lie: the evaluation's own list, its inputs, then the files this page was made from."""
    places = [folder.place(name.replace("_", " "), path) for name, path in evaluation.paths.items()]
    if not places:
        where = _inputs(folder, below)
        places = [folder.place(name, path) for name, path in where.items() if path]
    places.append(folder.place("evaluation", f"{below}{EVALUATION}"))
    places += [folder.place("config", CONFIG)] if folder.holds(CONFIG) else []
    return places + [folder.place("metrics", str(path.relative_to(folder.root))) for path in folder.files(METRICS)]
