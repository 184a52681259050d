"""Compares a derivative with a finite difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

_STEP = 1e-6


def check_derivative(
    value: Callable[[], Tensor], parameter: Tensor, index: tuple[int, ...], *, rounding: float
) -> None:
    """Asserts that one entry of a parameter's gradient, taken before, is the central difference, and is not zero.

    Args:
        value: Computes what was derived, from the parameter as it is; in float64.
        parameter: The parameter, with its gradient.
        index: The entry.
        rounding: Error of the difference by rounding.
    """
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[index] += sign * _STEP
            values.append(float(value()))
            parameter[index] -= sign * _STEP
    numeric = (values[0] - values[1]) / (2 * _STEP)
    assert parameter.grad is not None
    assert float(parameter.grad[index]) == pytest.approx(numeric, rel=1e-5, abs=rounding)
    assert numeric != 0
