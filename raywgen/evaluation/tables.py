"""Prints an evaluation as tables in a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from raywgen.evaluation.headline import headline
from raywgen.evaluation.results import Evaluation
from raywgen.evaluation.tokenizer_facts import SplitReport, TokenizerReport
from raywgen.progress import plain


def print_evaluation(result: Evaluation, console: Console) -> None:
    """Prints ladder, claims, novelty, and the sentence that it all comes to.

    Accuracies are in percent with half-widths of 95 % intervals over tasks.
    """
    cells = {(cell.split, cell.layout, cell.row): cell for cell in result.ladder}
    measured = {(split, layout) for split, layout, _ in cells}
    every = [(split, layout) for split in ("seen", "unseen") for layout in result.layouts]
    columns = [column for column in every if column in measured]
    count = max(cell.num_networks for cell in result.ladder)
    table = Table(
        "",
        *(plain(f"{split}\n{layout}") for split, layout in columns),
        title=f"Balanced accuracy in % on {result.num_test_images} test images that nothing was trained on, "
        f"{count} tasks a column, best of {result.best_of} by loss on {result.num_samples} examples",
    )
    group = "ladder"
    for row in result.rows:
        if row.group != group:
            table.add_section()
            group = row.group
        shown = [cells.get((split, layout, row.name)) for split, layout in columns]
        table.add_row(
            plain(row.label),
            *("-" if cell is None else f"{100 * cell.accuracy:.1f} ±{100 * cell.ci95:.1f}" for cell in shown),
            style="bold green" if row.name == "generated" else None,
        )
    console.print(table)
    if result.tokenizer is not None:
        print_tokenizer(result.tokenizer, console)
    for claim in result.claims:
        word = "[green]holds[/green]" if claim.holds else "[red]fails[/red]"
        console.print(f"  {word}  {plain(claim.text)}", highlight=False)
    if (novelty := result.novelty) is not None:
        console.print(
            f"\nnovelty: [bold]{plain(novelty.verdict)}[/bold]. {plain(novelty.verdict_text)}", highlight=False
        )
    if (found := headline(result)) is not None:
        console.print(f"\n[bold]{plain(found.label)}.[/bold] {plain(found.sentence)}", highlight=False)


def print_tokenizer(report: TokenizerReport, console: Console) -> None:
    """Prints bits, distortion and accuracy of a tokeniser, in a column for training networks and one for others."""
    table = Table(
        "",
        *(f"{split.num_networks} {split.split}" for split in report.splits),
        title=f"Tokeniser: {report.coder} coders, {report.num_levels} {report.quantiser} tokens of "
        f"{report.num_codes} codes; beside them {report.codebook_values:,} numbers in codebooks, "
        f"{report.decoder_values:,} in the decoder, {report.normalizer_values:,} in normalisers",
        title_justify="left",
    )
    for label, text_of in _TOKENIZER_ROWS.items():
        table.add_row(label, *(text_of(split) for split in report.splits))
    console.print(table)
    if report.no_accuracy:
        console.print(f"  no accuracy: {plain(report.no_accuracy)}", highlight=False)


def _accuracy(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.1f}"


_TOKENIZER_ROWS: dict[str, Callable[[SplitReport], str]] = {
    "bits per value": lambda split: f"{split.bits_per_value:.2f}",
    "values per token": lambda split: f"{split.values_per_token:.2f}",
    "signal to noise, dB": lambda split: f"{split.snr_db:.1f}",
    "below 6.02 dB per bit": lambda split: f"{split.snr_gap_db:.1f}",
    "codes used, %": lambda split: f"{100 * min(split.codes_used):.0f} to {100 * max(split.codes_used):.0f}",
    "perplexity of codes": lambda split: f"{min(split.code_perplexity):.0f} to {max(split.code_perplexity):.0f}",
    "accuracy": lambda split: _accuracy(split.original_accuracy),
    "accuracy, reconstructed": lambda split: _accuracy(split.reconstructed_accuracy),
}
