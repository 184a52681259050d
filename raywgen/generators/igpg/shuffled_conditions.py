"""Gives networks the conditions of others, to measure how much the right condition matters."""

from __future__ import annotations

from dataclasses import replace

import torch

from raywgen.weights import Condition


class ShuffleError(ValueError):
    """Conditions that cannot be shuffled."""


def shuffled_conditions(condition: Condition) -> Condition:
    """Rotates the conditions by the smallest shift that gives every network another instruction.

    Raises:
        ShuffleError: At every shift some network would keep its instruction.
    """
    texts = condition.instructions
    for shift in range(1, len(texts)):
        moved = texts[shift:] + texts[:shift]
        if all(mine != other for mine, other in zip(texts, moved, strict=True)):
            policies = condition.policies[shift:] + condition.policies[:shift]
            return replace(
                condition,
                instructions=moved,
                samples_BSF=torch.roll(condition.samples_BSF, -shift, dims=0),
                labels_BS=torch.roll(condition.labels_BS, -shift, dims=0),
                policies=policies,
            )
    raise ShuffleError(
        f"chunks=shuffled: of {len(texts)} networks with {len(set(texts))} different instructions none can be given "
        "another's; write for several tasks at once, each as often"
    )
