"""Passes over rows: their sizes, and that there are few where tensors have no values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raywgen.nn.coders.perceptron import PerceptronCoder
from raywgen.nn.passes import few_passes, rows_of_a_pass
from raywgen.nn.quantisers.kmeans import nearest_code
from raywgen.nn.quantisers.residual import ResidualQuantiser
from raywgen.training.plan.valueless import valueless


class Operations(TorchDispatchMode):
    """Counts operations on tensors."""

    num = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.num += 1
        return func(*args, **(kwargs or {}))


def test_a_pass_has_as_many_rows_as_its_numbers_allow() -> None:
    assert rows_of_a_pass(1000, 10, 250) == 25
    assert rows_of_a_pass(1000, 500, 250) == 1
    assert rows_of_a_pass(1000, 0, 250) == 250


def test_few_passes_take_more_rows_and_end_with_their_block() -> None:
    with few_passes(4):
        assert rows_of_a_pass(1000, 10, 250) == 250
        assert rows_of_a_pass(1001, 10, 250) == 251
        assert rows_of_a_pass(80, 10, 250) == 25
    assert rows_of_a_pass(1000, 10, 250) == 25


@pytest.mark.parametrize("name", ["perceptron", "nearest_code", "beam"])
def test_the_operations_of_a_plan_do_not_grow_with_the_rows(name: str) -> None:
    def num_operations(num_rows: int) -> int:
        with valueless(), Operations() as operations, torch.no_grad():
            x_NK = torch.zeros(num_rows, 4)
            if name == "perceptron":
                PerceptronCoder(4, 3, 256)(x_NK.unsqueeze(0), torch.zeros(num_rows, 3))
            elif name == "nearest_code":
                nearest_code(x_NK, torch.zeros(256, 4))
            else:
                ResidualQuantiser(2, 256, 4, beam=4).encode(x_NK)
        return operations.num

    # The second takes hundreds of passes with values.
    assert num_operations(1 << 19) <= 5 * num_operations(1 << 8)
