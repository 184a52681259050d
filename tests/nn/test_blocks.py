"""Blocks whose activations are computed again give the same results, and keep less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raywgen.nn.blocks import Blocks, compile_error, prepare_blocks
from raywgen.nn.transformer import Transformer


def trained(trunk: Transformer, x_BTH: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients, and the number of values that are kept for the backward pass."""
    torch.manual_seed(1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        output_BTH = trunk.train()(x_BTH)
    output_BTH.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in trunk.parameters() if parameter.grad is not None]
    trunk.zero_grad()
    return output_BTH.detach(), gradients, sum(tensor.numel() for tensor in kept)


def test_recomputed_blocks_give_the_same_gradients_and_keep_less() -> None:
    """Dropout draws the same masks again."""
    torch.manual_seed(0)
    trunk, x_BTH = Transformer(16, 3, 2, dropout=0.2), torch.randn(4, 9, 16)
    plain, plain_gradients, plain_kept = trained(trunk, x_BTH)
    prepare_blocks(trunk, recompute=True, compiled=False)
    again, gradients, kept = trained(trunk, x_BTH)
    assert torch.equal(again, plain)
    assert len(gradients) == len(plain_gradients) > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, plain_gradients, strict=True))
    assert kept < plain_kept / 3
    prepare_blocks(trunk, recompute=False, compiled=False)
    assert trained(trunk, x_BTH)[2] == plain_kept


def test_compiled_blocks_are_called_in_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compiled(block: torch.nn.Module) -> object:
        return lambda *arguments: (calls.append(1), block(*arguments))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    trunk, x_BTH = Transformer(16, 3, 2), torch.randn(4, 9, 16)
    expected = trunk(x_BTH)
    prepare_blocks(trunk, recompute=False, compiled=True)
    assert torch.equal(trunk(x_BTH), expected)
    assert len(calls) == 3
    # A cache grows with every position, so that nothing compiled would be of use twice.
    trunk(x_BTH, trunk.new_cache(4, 9))
    assert len(calls) == 3
    assert trunk.state_dict().keys() == Transformer(16, 3, 2).state_dict().keys()


def test_a_missing_compiler_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: object) -> object:
        raise RuntimeError("no compiler\nthat is found")

    monkeypatch.setattr(torch, "compile", fails)
    assert compile_error(torch.device("cpu")) == "RuntimeError: no compiler"


def test_all_blocks_of_a_module_are_prepared() -> None:
    module = torch.nn.ModuleList([Transformer(16, 1, 2), Transformer(16, 1, 2)])
    prepare_blocks(module, recompute=True, compiled=False)
    found = [part for part in module.modules() if isinstance(part, Blocks)]
    assert [blocks.recompute for blocks in found] == [True, True]
