"""Single steps with prepared weights, compiled or not, are those of the transformer itself.

Shape legend: B sequences, T positions, H width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raywgen.nn import decoding
from raywgen.nn.decoding import PreparedTransformer, compiles
from raywgen.nn.transformer import Transformer, TransformerBlock

WIDTH, NUM_COMMON = 16, 3
CPU = torch.device("cpu")


def transformer_of(num_kv_heads: int) -> Transformer:
    torch.manual_seed(0)
    built = Transformer(WIDTH, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads).eval()
    with torch.no_grad():
        for block in built.blocks:
            assert isinstance(block, TransformerBlock)
            block.qkv.weight.mul_(3)
    return built


def inputs(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


def steps(transformer: Transformer, x_BTH: Tensor, prepared: PreparedTransformer, dtype: torch.dtype | None) -> Tensor:
    """The first positions in one pass, as the prefix is, and each later one in a step of its own."""
    cache = transformer.new_cache(len(x_BTH), x_BTH.shape[1], dtype)
    first = transformer(x_BTH[:, :NUM_COMMON], cache)
    later = [prepared.step(x_BH, cache) for x_BH in x_BTH[:, NUM_COMMON:].unbind(1)]
    assert cache.length == x_BTH.shape[1]
    return torch.cat([first, torch.stack(later, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_prepared_steps_equal_one_full_pass(num_kv_heads: int, batch: int) -> None:
    transformer, x_BTH = transformer_of(num_kv_heads), inputs(batch, 9)
    found = steps(transformer, x_BTH, PreparedTransformer(transformer, 9), None)
    # Attention sums in another order: a few roundings of float32 at outputs of size 1.
    torch.testing.assert_close(found, transformer(x_BTH), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("num_kv_heads", "batch"), [(2, 1), (4, 3)])
def test_compiled_steps_equal_one_full_pass_in_caches_of_all_sizes(
    num_kv_heads: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SMALLEST_BUCKET", 4)
    transformer, x_BTH = transformer_of(num_kv_heads), inputs(batch, 10)
    prepared = PreparedTransformer(transformer, 10, compiled=True)
    # As above; the cache is read up to 4, 8 and all 10 positions.
    torch.testing.assert_close(steps(transformer, x_BTH, prepared, None), transformer(x_BTH), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_products_and_caches_in_bfloat16_stay_near(compiled: bool) -> None:
    transformer, x_BTH = transformer_of(4), inputs(2, 6)
    prepared = PreparedTransformer(transformer, 6, torch.bfloat16, compiled=compiled)
    found, expected = steps(transformer, x_BTH, prepared, torch.bfloat16), transformer(x_BTH)
    assert found.dtype == torch.float32
    # Eight bits of mantissa in weights, inputs, keys and values of two layers, at outputs of size 1.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.08)
    assert not torch.allclose(found, expected, atol=1e-5)


def test_few_steps_are_not_worth_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_compile_error", lambda device: "")
    assert not compiles("auto", 100, CPU)
    assert compiles("auto", 100_000, CPU)
    assert compiles("always", 1, CPU)
    assert not compiles("never", 100_000, CPU)


def test_without_a_compiler_steps_go_on_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_compile_error", lambda device: "no C++ compiler")
    assert not compiles("auto", 100_000, CPU)
    with pytest.warns(UserWarning, match="no effect: nothing compiles for cpu here .no C"):
        assert not compiles("always", 1, CPU)
