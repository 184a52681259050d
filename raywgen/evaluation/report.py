"""Writes the report on a run folder: one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean, median_low

from jinja2 import Environment, PackageLoader, StrictUndefined

from raywgen.evaluation.plots import (
    MARKERS,
    NOVELTY_SIGNS,
    LadderRow,
    codebook_plot,
    ladder_plot,
    loss_plot,
    novelty_plot,
    sparkline,
)
from raywgen.evaluation.report_inputs import ReportError, StageLog, read_evaluation, read_metrics
from raywgen.evaluation.results import EVALUATION, GROUPS, SPLITS, Cell, Codebook, Evaluation, NoveltyRow, Row
from raywgen.evaluation.tokenizer_facts import TokenizerReport
from raywgen.inputs import MAX_YAML_BYTES, read_regular
from raywgen.locations import joined
from raywgen.mirror import working_folder
from raywgen.storage import Storage

__all__ = ["ReportError", "write_report"]

_EVALUATION, _CONFIG, _METRICS, _REPORT = f"evaluation/{EVALUATION}", "config.yaml", "metrics.jsonl", "report.html"
_GROUP_TITLES = {"ladder": "Ladder", "baseline": "Baselines", "ablation": "Ablations"}
_RETRIEVAL = "nearest"  # Names of baselines that look up a stored network begin with it.
_LOSSES = ("loss", "val_loss")


def write_report(run_dir: str | Path) -> str:
    """Writes `report.html` into a run folder: one page that loads nothing from the internet.

    Reads `evaluation/evaluation.json`, and where they exist `config.yaml` and every `metrics.jsonl` below the folder.

    Args:
        run_dir: The run folder, a local path or a URI.

    Returns:
        The page's path or URI.

    Raises:
        ReportError: `evaluation.json` is missing or damaged.
        StorageError: The folder cannot be read or written.
    """
    storage = Storage.at(run_dir)
    if storage.size(_EVALUATION) is None:
        missing = joined(run_dir, _EVALUATION)
        raise ReportError(f"{missing} does not exist, so there is nothing to report; run `raywgen evaluate` first")
    names = [] if storage.is_local else [name for name in storage.walk() if _is_shown(name)]
    with working_folder(run_dir, *names) as root:
        html = _page(root, Path(storage.root).resolve().name)
    storage.write(_REPORT, html.encode())
    return joined(run_dir, _REPORT)


def _is_shown(name: str) -> bool:
    return name in (_EVALUATION, _CONFIG) or name.rpartition("/")[2] == _METRICS


def _page(root: Path, name: str) -> str:
    evaluation = read_evaluation(root / _EVALUATION)
    environment = Environment(
        loader=PackageLoader("raywgen.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html").render(**_content(root, name, evaluation))


def _content(root: Path, name: str, evaluation: Evaluation) -> dict[str, object]:
    """Returns the values of all variables of the template."""
    logs, num_unreadable = [], 0
    metric_files = [path for path in sorted(root.rglob(_METRICS)) if _is_within(path, root)]
    for file in metric_files:
        found, unreadable = read_metrics(file, run=str(file.parent.relative_to(root)))
        logs += found
        num_unreadable += unreadable
    config = root / _CONFIG
    markers = _markers(evaluation)
    return {
        "run": name,
        "written": datetime.now().astimezone(),
        "evaluation": evaluation,
        "cards": _cards(evaluation),
        "ladders": [_ladder(evaluation, split, markers) for split in SPLITS if _has(evaluation, split)],
        "signs": [(sign, layout) for layout, (_, sign) in markers.items()],
        "groups": _table(evaluation),
        "splits": [split for split in SPLITS if _has(evaluation, split)],
        "num_networks": sorted({cell.num_networks for cell in evaluation.ladder}),
        "novelty": [_novelty(evaluation, split) for split in SPLITS if _novelty_rows(evaluation, split)],
        "stages": [_stage(log) for log in logs],
        "num_unreadable": num_unreadable,
        "tokenizer_title": _tokenizer_finding(evaluation.tokenizer) if evaluation.tokenizer else "",
        "codebook": _codebook(evaluation.codebook) if evaluation.codebook else None,
        "config": _text(config) if _is_within(config, root) else None,
        "paths": _paths(root, evaluation, [config, *metric_files]),
    }


def _is_within(path: Path, root: Path) -> bool:
    """Whether a file lies in the run folder; a link could bring any file of this machine into the report."""
    return path.is_file() and path.resolve().is_relative_to(root.resolve())


def _text(path: Path) -> str:
    return read_regular(path, MAX_YAML_BYTES).decode(errors="replace")


def _markers(evaluation: Evaluation) -> dict[str, tuple[str, str]]:
    """Returns the marker of each layout in plots and the sign for it in text."""
    return {layout: MARKERS[index % len(MARKERS)] for index, layout in enumerate(evaluation.layouts)}


def _has(evaluation: Evaluation, split: str) -> bool:
    return any(cell.split == split for cell in evaluation.ladder)


def _cells(evaluation: Evaluation, split: str, row: str) -> list[Cell]:
    """Returns the cells of a row on a split, one per layout, in the order of the layouts."""
    chosen = [cell for cell in evaluation.ladder if (cell.split, cell.row) == (split, row)]
    return sorted(chosen, key=lambda cell: evaluation.layouts.index(cell.layout))


def _mean(cells: Sequence[Cell]) -> tuple[float, float] | None:
    """Returns the mean over layouts and half the width of its 95 % interval, in percent.

    The layouts are measured on the same tasks, so their errors may be correlated. The mean of their intervals holds
    however strong the correlation is.
    """
    if not cells:
        return None
    return 100 * fmean(cell.accuracy for cell in cells), 100 * fmean(cell.ci95 for cell in cells)


def _best_baseline(evaluation: Evaluation, split: str, prefix: str = "") -> Row | None:
    """Returns the most accurate baseline whose name begins with `prefix`."""
    means = {
        row: mean[0]
        for row in evaluation.rows
        if row.group == "baseline"
        and row.name.startswith(prefix)
        and (mean := _mean(_cells(evaluation, split, row.name)))
    }
    return max(means, key=lambda row: means[row], default=None)


def _compare(generated: tuple[float, float], other: tuple[float, float]) -> str:
    """Says how generated networks compare with others; a difference inside the joint interval is reported as none."""
    difference = generated[0] - other[0]
    if abs(difference) <= math.hypot(generated[1], other[1]):
        return "level with it"
    return f"{abs(difference):.1f} percentage points {'above' if difference > 0 else 'below'} it"


def _cards(evaluation: Evaluation) -> list[dict[str, object]]:
    """Returns the headline figures: generated networks and what they compare to, on unseen tasks or else seen ones."""
    split = next((name for name in SPLITS if _cells(evaluation, name, "generated")), SPLITS[0])
    generated = _mean(_cells(evaluation, split, "generated"))
    budget = f"best of {evaluation.best_of}" if evaluation.best_of else ""
    cards = [_card(f"Generated, {split}", generated, budget, accent=True)]
    rows = {row.name: row for row in evaluation.rows}
    compared = {
        f"Trained, {split}": rows.get("original"),
        f"Best stored, {split}": _best_baseline(evaluation, split, prefix=_RETRIEVAL),
        f"Best baseline, {split}": _best_baseline(evaluation, split),
    }
    if compared[f"Best stored, {split}"] == compared[f"Best baseline, {split}"]:
        del compared[f"Best stored, {split}"]
    for title, row in compared.items():
        mean = _mean(_cells(evaluation, split, row.name)) if row else None
        if row and mean:
            stands = f"; generated is {_compare(generated, mean)}" if generated else ""
            cards.append(_card(title, mean, row.label + stands))
    if split != "seen":
        cards.append(_card("Generated, seen", _mean(_cells(evaluation, "seen", "generated")), budget, accent=True))
    return [card for card in cards if card]


def _card(title: str, mean: tuple[float, float] | None, note: str, accent: bool = False) -> dict[str, object] | None:
    return mean and {"title": title, "value": mean[0], "interval": mean[1], "note": note, "accent": accent}


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
        if row.group == group and (cells := _cells(evaluation, split, row.name))
    ]
    original = _mean(_cells(evaluation, split, "original"))
    title = _ladder_finding(evaluation, split)
    lowest = min(cell.accuracy - cell.ci95 for cell in evaluation.ladder)
    limits = (max(0.0, 5 * math.floor(20 * lowest - 0.2)), 100.0)
    return {"title": title, "plot": ladder_plot(rows, limits, original[0] if original else None, title)}


def _ladder_finding(evaluation: Evaluation, split: str) -> str:
    generated = _mean(_cells(evaluation, split, "generated"))
    if generated is None:
        return f"Accuracy on {split} tasks"
    text = f"On {split} tasks, generated networks reach {generated[0]:.1f}"
    baseline = _best_baseline(evaluation, split)
    against = _mean(_cells(evaluation, split, baseline.name)) if baseline else None
    if baseline and against:
        text += f", {_compare(generated, against).removesuffix('it')}the best baseline ({_lower(baseline.label)})"
    original = _mean(_cells(evaluation, split, "original"))
    return text + (f" and {_compare(generated, original).removesuffix('it')}trained ones" if original else "")


def _lower(label: str) -> str:
    """Returns a label as it stands inside a sentence; names in capitals stay."""
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]


def _table(evaluation: Evaluation) -> list[dict[str, object]]:
    """Returns the rows of the table by group, each with its cells by split and layout."""
    cells = {(cell.row, cell.split, cell.layout): cell for cell in evaluation.ladder}
    groups = [
        {
            "title": _GROUP_TITLES[group],
            "rows": [
                {
                    "row": row,
                    "cells": [
                        cells.get((row.name, split, layout))
                        for split in SPLITS
                        if _has(evaluation, split)
                        for layout in evaluation.layouts
                    ],
                }
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
    rise = f", {100 * (last / best - 1):.0f} % higher at the end" if best > 0 and last > 1.01 * best else ""
    return f"{name} lowest at step {best_step:,.0f}, {best:.3g}{rise}"


def _tokenizer_finding(report: TokenizerReport) -> str:
    """Sums up the tokeniser by the networks that it was not trained on, where there are any."""
    row = report.splits[-1]
    text = (
        f"At {row.bits_per_value:.2f} bits per value, {row.split} networks keep {row.snr_db:.1f} dB, "
        f"{row.snr_gap_db:.1f} below the bound"
    )
    if row.original_accuracy is None or row.reconstructed_accuracy is None:
        return text
    lost = 100 * (row.original_accuracy - row.reconstructed_accuracy)
    return f"{text}, and {'lose' if lost >= 0 else 'gain'} {abs(lost):.1f} percentage points of accuracy"


def _codebook(codebook: Codebook) -> dict[str, object]:
    levels = []
    for index, counts in enumerate(codebook.usage, start=1):
        total = sum(counts)
        shares = [count / total if total else 0.0 for count in counts]
        perplexity = math.exp(-sum(share * math.log(share) for share in shares if share)) if total else 0.0
        title = f"Level {index}: perplexity {perplexity:.0f} of {codebook.codes}"
        unused = sum(not count for count in counts)
        levels.append(
            {"index": index, "perplexity": perplexity, "unused": unused, "plot": codebook_plot(shares, title)}
        )
    unused = sum(level["unused"] for level in levels)
    low, high = (round(pick(level["perplexity"] for level in levels)) for pick in (min, max))
    perplexity = f"{low}" if low == high else f"{low} to {high}"
    used = (
        "Every code is in use" if not unused else f"{unused} of {codebook.codes * len(levels):,} codes are never used"
    )
    return {"title": f"{used}; perplexity {perplexity} of {codebook.codes} per level", "levels": levels}


def _paths(root: Path, evaluation: Evaluation, others: Sequence[Path]) -> list[tuple[str, str]]:
    """Lists where files lie: the evaluation's own list, then the files this page was made from."""
    rows = [(name.replace("_", " "), path) for name, path in evaluation.paths.items()]
    rows.append(("evaluation", f"evaluation/{EVALUATION}"))
    rows += [
        ("config" if path.suffix == ".yaml" else "metrics", str(path.relative_to(root)))
        for path in others
        if path.is_file()
    ]
    return rows
