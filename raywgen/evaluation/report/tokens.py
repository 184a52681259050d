"""The part of a page on a tokeniser: what it costs and keeps, and the use of its codes."""

from __future__ import annotations

import math

from raywgen.evaluation.report.plots import codebook_plot
from raywgen.evaluation.results import Codebook
from raywgen.evaluation.tokenizer_facts import TokenizerReport


def tokenizer_part(report: TokenizerReport) -> dict[str, object]:
    """Returns a tokeniser's figures and what they come to."""
    return {"title": _finding(report), "report": report}


def _finding(report: TokenizerReport) -> str:
    """Sums up the tokeniser by the networks that it was not trained on, where there are any."""
    row = report.splits[-1]
    text = (
        f"At {row.bits_per_value:.2f} bits per value, {row.split} networks keep {row.snr_db:.1f} dB, "
        f"{abs(row.snr_gap_db):.1f} {'below' if row.snr_gap_db >= 0 else 'above'} the bound"
    )
    if row.original_accuracy is None or row.reconstructed_accuracy is None:
        return text
    lost = round(round(100 * row.original_accuracy, 1) - round(100 * row.reconstructed_accuracy, 1), 1)
    if lost == 0:
        return f"{text}, and lose no accuracy"
    return f"{text}, and {'lose' if lost > 0 else 'gain'} {abs(lost):.1f} percentage points of accuracy"


def codebook_part(codebook: Codebook) -> dict[str, object]:
    """Returns a plot of each level's use, and what they come to."""
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
