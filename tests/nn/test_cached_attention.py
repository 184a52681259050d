"""The built kernel attends as sums over products do, whatever the size of cache and heads, and writes into the cache.

Shape legend: B sequences, J heads of keys and values, G queries that share one, T positions, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from raywgen.nn import cached_attention, decoding
from raywgen.nn.cached_attention import can_attend, write_and_attend
from raywgen.nn.decoding import PreparedTransformer
from raywgen.nn.transformer import Transformer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unbuilt() -> Iterator[None]:
    """Forgets the libraries of a test that stands for another machine."""
    yield
    cached_attention._library.cache_clear()


def expected(query_BJGE: Tensor, keys_BJTE: Tensor, values_BJTE: Tensor) -> Tensor:
    shares = (query_BJGE.double() @ keys_BJTE.double().transpose(2, 3)).softmax(dim=-1)
    return shares @ values_BJTE.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_width", "num_shared"), [(32, 1), (64, 3), (96, 1)])
@pytest.mark.parametrize("position", [0, 1, 15, 16, 17, 38])
def test_it_attends_to_all_positions_up_to_the_new_one(
    dtype: torch.dtype, head_width: int, num_shared: int, position: int
) -> None:
    assert can_attend(head_width, dtype, CPU)
    torch.manual_seed(position)
    query_BJGE = 3 * torch.randn(2, 3, num_shared, head_width) * head_width**-0.5
    key, value = torch.randn(2, 2, 3, head_width)
    whole_keys, whole_values = torch.randn(2, 2, 3, 50, head_width).to(dtype)
    # What is not written yet must not be read as numbers.
    whole_keys[:, :, position:] = whole_values[:, :, position:] = float("nan")
    keys, values = whole_keys[:, :, :40], whole_values[:, :, :40]
    found = write_and_attend(query_BJGE, key, value, keys, values, torch.tensor([position]))
    assert torch.equal(keys[:, :, position], key.to(dtype))
    assert torch.equal(values[:, :, position], value.to(dtype))
    written = slice(0, position + 1)
    # A few roundings of float32: sums over up to 96 products, and an exponential to 2e-7, of values of size 1.
    torch.testing.assert_close(
        found.double(), expected(query_BJGE, keys[:, :, written], values[:, :, written]), rtol=1e-5, atol=3e-6
    )


def test_threads_share_the_work_and_scores_may_lie_far_apart() -> None:
    query, key, value = (torch.randn(5, 2, *shape) for shape in ((1, 32), (32,), (32,)))
    keys, values = torch.randn(2, 5, 2, 20, 32)
    arguments = (300 * query, key, value, keys, values, torch.tensor([19]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = write_and_attend(*arguments)
        torch.set_num_threads(2)
        assert torch.equal(write_and_attend(*arguments), alone)
    finally:
        torch.set_num_threads(threads)
    # Scores reach 1,000 here, and are rounded at 6e-5.
    torch.testing.assert_close(alone.double(), expected(300 * query, keys, values), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_compiled_steps_with_it_equal_one_full_pass(num_kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SMALLEST_BUCKET", 4)
    torch.manual_seed(0)
    transformer = Transformer(64, num_layers=2, num_heads=2, num_kv_heads=num_kv_heads).eval()
    x_BTH, cache = torch.randn(3, 10, 64), transformer.new_cache(3, 10)
    prepared = PreparedTransformer(transformer, 10, compiled=True)
    assert decoding._how_compiled(cache.keys) == "kernel"
    found = torch.stack([prepared.step(x_BH, cache) for x_BH in x_BTH.unbind(1)], dim=1)
    torch.testing.assert_close(found, transformer(x_BTH), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_it_is_not_used(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_attention._library.cache_clear()
    monkeypatch.setenv("CXX", compiler)
    assert not can_attend(64, torch.float32, CPU)


def test_other_widths_types_and_devices_go_without_it() -> None:
    assert not can_attend(48, torch.float32, CPU)
    assert not can_attend(64, torch.float64, CPU)
    assert not can_attend(64, torch.float32, torch.device("meta"))
