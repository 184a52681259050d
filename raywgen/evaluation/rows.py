"""The rows of the ladder, with a sentence on each for people."""

from __future__ import annotations

from typing import Any

_ROWS = [
    ("original", "ladder", "Trained on the task", "A network trained on this very task; no generator saw it."),
    ("reconstructed", "ladder", "Reconstructed", "That network through the generator's own tokens and back."),
    ("generated", "ladder", "Generated", "Written by the generator; best of n by loss on the examples."),
    ("finetuned_{}", "ladder", "Generated, fine-tuned", "The generated network trained on the task's images."),
    ("token_prior", "ablation", "Without the task-loss stage", "The same prior before training by task loss."),
    ("hypernetwork", "ablation", "Hypernetwork", "Weights straight from the condition, trained by task loss."),
    ("random", "baseline", "Random start", "Fresh initialisations; best of n."),
    ("shared_start", "baseline", "Shared start", "Where all networks of the corpus started."),
    ("start_finetuned_{}", "baseline", "Shared start, fine-tuned", "The shared start trained on the task's images."),
    ("nearest_finetuned_{}", "baseline", "Nearest, fine-tuned", "The nearest stored network trained on the images."),
    ("random_finetuned_{}", "baseline", "Random start, fine-tuned", "A fresh initialisation trained on the images."),
    ("average", "baseline", "Average", "The mean of all stored networks."),
    ("gaussian", "baseline", "Gaussian", "Draws of each coordinate's own Gaussian; best of n."),
    ("nearest_condition", "baseline", "Retrieval by condition", "Stored networks with the nearest instruction."),
    ("nearest_loss", "baseline", "Retrieval by loss", "Of all stored networks the best on the examples."),
    ("average_best", "baseline", "Average of the best", "Mean of the n stored networks best on the examples."),
    ("noise", "baseline", "Stored plus noise", "The best stored network with a little noise; best of n."),
    ("gradient", "baseline", "Gradient", "The shared start fitted to the same examples; best of n."),
]


def rungs(finetune_epochs: list[int], present: set[str]) -> list[dict[str, Any]]:
    """Name, group, label and help of every row that was measured, in reading order."""
    table = []
    for name, group, label, text in _ROWS:
        for epochs in finetune_epochs if "{}" in name else [None]:
            suffix = "" if epochs is None else f", {epochs} epoch{'s' if epochs > 1 else ''}"
            row = {"name": name.format(epochs), "group": group, "label": label + suffix, "help": text}
            table.append(row)
    return [row for row in table if row["name"] in present]
