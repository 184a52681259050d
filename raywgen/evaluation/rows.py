"""The rows of the ladder, each with a sentence that explains it."""

from __future__ import annotations

from collections.abc import Sequence

from raywgen.evaluation.results import Row
from raywgen.generators.reporting import Ablation

_LADDER = [
    ("original", "ladder", "Trained on the task", "A network trained on this very task; no generator saw it."),
    ("reconstructed", "ladder", "Reconstructed", "That network encoded by the generator and decoded again."),
    ("generated", "ladder", "Generated", "Written by the generator; best of n by loss on the examples."),
    ("finetuned_{}", "ladder", "Generated, fine-tuned", "The generated network trained on the task's images."),
]
_OTHERS = [
    ("hypernetwork", "baseline", "Hypernetwork", "Weights straight from the condition, trained by task loss."),
    ("shuffled", "baseline", "Told another task", "Written and chosen for the next task, and judged on this one."),
    ("random", "baseline", "Random start", "Fresh initialisations; best of n."),
    ("shared_start", "baseline", "Shared start", "The start that all networks of the corpus share."),
    ("average", "baseline", "Average", "The mean of all stored networks."),
    ("gaussian", "baseline", "Gaussian", "Draws of each coordinate's own Gaussian; best of n."),
    ("nearest_condition", "baseline", "Retrieval by condition", "Stored networks with the nearest instruction."),
    ("nearest_loss", "baseline", "Retrieval by loss", "The stored network with the lowest loss on the examples."),
    ("average_best", "baseline", "Average of the best", "Mean of the n stored networks best on the examples."),
    ("noise", "baseline", "Stored plus noise", "The best stored network with a little noise; best of n."),
    ("gradient", "baseline", "Gradient", "The shared start fitted to the same examples; best of n."),
    ("start_finetuned_{}", "finetuned", "Shared start, fine-tuned", "The shared start trained on the task's images."),
    ("nearest_finetuned_{}", "finetuned", "Nearest, fine-tuned", "The nearest stored network trained on the images."),
    ("random_finetuned_{}", "finetuned", "Random start, fine-tuned", "A fresh initialisation trained on the images."),
]


def ladder_rows(finetune_epochs: list[int], present: set[str], ablations: Sequence[Ablation]) -> tuple[Row, ...]:
    """Returns the rows that were measured, in reading order.

    Args:
        finetune_epochs: The fine-tuning lengths that were measured.
        present: Names of the rows that were measured.
        ablations: Rows that the generator's own method adds.
    """
    own = [(one.row, "ablation", one.label, one.help) for one in ablations]
    table = []
    for name, group, label, text in (*_LADDER, *own, *_OTHERS):
        for epochs in finetune_epochs if "{}" in name else [None]:
            suffix = "" if epochs is None else f", {epochs} epoch{'s' if epochs > 1 else ''}"
            table.append(Row(name=name.format(epochs), group=group, label=label + suffix, help=text))
    return tuple(row for row in table if row.name in present)
