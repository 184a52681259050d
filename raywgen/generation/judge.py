"""Compares generated networks with chance and a linear classifier on a user's samples, and advises if no better."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywgen.generation.best import candidate_logits
from raywgen.generation.warn_caller import warn_caller
from raywgen.generators import Generator
from raywgen.tasks.linear_reference import left_out_accuracy
from raywgen.tasks.standing import Standing, standing
from raywgen.weights import Layout


class ChanceWarning(UserWarning):
    """A generated network classifies the labelled samples no better than chance, or than a linear classifier does."""


@torch.no_grad()
def judge(module: nn.Module, layout: Layout, values_D: Tensor, samples_SF: Tensor, labels_S: Tensor) -> Standing:
    """Runs one generated network on labelled samples and compares it with chance and with a linear classifier.

    Args:
        module: A module in eval mode that takes flat samples.
        layout: Layout of the network.
        values_D: Its flat vector.
        samples_SF: Inputs.
        labels_S: Their classes.
    """
    logits_1SC = candidate_logits(module, layout, values_D.unsqueeze(0), samples_SF.unsqueeze(0))
    return standing(logits_1SC[0], labels_S, linear=left_out_accuracy(samples_SF, labels_S))


def remedies(generator: Generator, best_of: int | None, *, is_known: bool, adapted: bool = False) -> str:
    """Returns what a user can do about a network that is no better than chance or than a linear classifier.

    Args:
        generator: The generator that wrote it.
        best_of: Number of candidates that it was chosen from; None where that cannot be set.
        is_known: Whether the generator was trained on its layout.
        adapted: Whether it was generated from examples alone.
    """
    advice = []
    if not is_known:
        sizes = sorted({layout.num_values for layout, _ in generator.normalizers.values()})
        advice.append(
            "fill an architecture that the generator was trained on "
            f"(of {', '.join(f'{size:,}' for size in sizes[:4])}{' ...' if len(sizes) > 4 else ''} values)"
        )
    if best_of is not None:
        advice.append(f"draw more networks (best_of={4 * best_of}, or another seed)")
    if adapted:
        advice.append("give more examples of each class")
    advice.append("train the network on from here on samples of yours, as `raywgen finetune` does")
    return "; ".join(advice)


def warn_of_chance(name: str, on_samples: Standing, remedy: str) -> None:
    """Warns where a network is no better than chance or a linear classifier, as far as the samples can say."""
    if not on_samples.is_doubtful:
        return
    warn_caller(f"{name} on your samples: {on_samples.sentence()}; for a better network {remedy}", ChanceWarning)
