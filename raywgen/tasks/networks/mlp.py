"""Multi-layer perceptrons with ReLU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from raywgen.tasks.base import TaskError


def mlp(widths: Sequence[int], bias: bool = True) -> nn.Module:
    """Builds a ReLU perceptron; `widths` runs from the features of a sample to the classes.

    It takes `(S, widths[0])` floats and gives logits `(S, widths[-1])`.

    Args:
        widths: Numbers of units.
        bias: Whether layers have biases.

    Raises:
        TaskError: Fewer than two widths, or one below 1.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise TaskError(f"widths={list(widths)}: give at least two positive widths, for instance [64, 14, 2]")
    modules: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        modules += [nn.Linear(width_in, width_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*modules[:-1])
