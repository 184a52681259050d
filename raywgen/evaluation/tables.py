"""An evaluation as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_evaluation(result: dict[str, Any], console: Console) -> None:
    """Prints ladder, claims and verdict; accuracies in points with half-widths of 95 % intervals over tasks."""
    accuracy = {(row["split"], row["layout"], row["rung"]): row for row in result["ladder"]}
    columns = [(split, layout) for split in ("seen", "unseen") for layout in result["layouts"]]
    count = max(row["num_networks"] for row in result["ladder"])
    table = Table(
        "",
        *(f"{split}\n{layout}" for split, layout in columns),
        title=f"Balanced accuracy on {result['num_test_images']} test images that nothing was trained on, "
        f"{count} tasks a column, best of {result['best_of']} by loss on {result['num_samples']} examples",
    )
    group = "ladder"
    for rung in result["rungs"]:
        if rung["group"] != group:
            table.add_section()
            group = rung["group"]
        cells = [accuracy[split, layout, rung["name"]] for split, layout in columns]
        style = "bold green" if rung["name"] == "generated" else None
        table.add_row(
            rung["label"], *(f"{100 * row['accuracy']:.1f} ±{100 * row['ci95']:.1f}" for row in cells), style=style
        )
    console.print(table)
    for claim in result["claims"]:
        console.print(f"  {'[green]holds[/green]' if claim['holds'] else '[red]fails[/red]'}  {claim['text']}")
    novelty = result["novelty"]
    console.print(f"\nverdict: [bold]{novelty['verdict']}[/bold]. {novelty['verdict_text']}", highlight=False)
