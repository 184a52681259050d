"""The causal transformer: nothing looks ahead, and the cache changes nothing.

Shape legend: B sequences, T positions, A heads, E width of a head, H width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raywgen.nn.transformer import Transformer, _rotate, _rotation

WIDTH, LENGTH = 16, 9


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(WIDTH, num_layers=3, num_heads=2).eval()


@pytest.fixture(scope="module")
def x_BTH() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changed", range(LENGTH))
def test_a_change_leaves_earlier_outputs_bit_equal(transformer: Transformer, x_BTH: Tensor, changed: int) -> None:
    other_BTH = x_BTH.clone()
    other_BTH[:, changed] += 1.0
    before, after = transformer(x_BTH), transformer(other_BTH)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert all(not torch.allclose(before[:, t], after[:, t], atol=1e-6) for t in range(changed, LENGTH))


@pytest.mark.parametrize("num_prefix", [1, 3, LENGTH])
def test_cached_steps_equal_one_full_pass(transformer: Transformer, x_BTH: Tensor, num_prefix: int) -> None:
    cache = transformer.new_cache(len(x_BTH), LENGTH)
    parts = [transformer(x_BTH[:, :num_prefix], cache)]
    parts += [transformer(x_BTH[:, t : t + 1], cache) for t in range(num_prefix, LENGTH)]
    assert cache.length == LENGTH
    # Attention sums in another order with a cache: a few roundings of float32 at outputs of size 1.
    torch.testing.assert_close(torch.cat(parts, dim=1), transformer(x_BTH), rtol=1e-5, atol=1e-5)


def test_a_cache_is_not_continued_by_several_positions(transformer: Transformer, x_BTH: Tensor) -> None:
    cache = transformer.new_cache(len(x_BTH), LENGTH)
    transformer(x_BTH[:, :2], cache)
    with pytest.raises(AssertionError, match="one position at a time"):
        transformer(x_BTH[:, 2:4], cache)


@pytest.mark.parametrize("shift", [1, 5, 40])
def test_rotary_scores_depend_on_distance_alone(shift: int) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def scores(start: int) -> Tensor:
        rotation = _rotation(start, 6, 8, torch.device("cpu"))
        rotated_query, rotated_key = (_rotate(x.expand(1, 1, 6, 8), rotation) for x in (query, key))
        return (rotated_query @ rotated_key.transpose(-1, -2))[0, 0]

    # Angles of up to 46 rad carry float32 errors of 46 * 6e-8 each.
    torch.testing.assert_close(scores(0), scores(shift), rtol=0, atol=5e-5)
    for diagonal in range(-5, 6):
        values = scores(0).diagonal(diagonal)
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=0, atol=5e-5)
    assert scores(0).std() > 0.1


def test_order_matters_and_rotation_keeps_lengths(transformer: Transformer, x_BTH: Tensor) -> None:
    swapped_BTH = x_BTH[:, [1, 0, *range(2, LENGTH)]]
    assert not torch.allclose(transformer(x_BTH)[:, -1], transformer(swapped_BTH)[:, -1], atol=1e-4)
    heads = x_BTH.unflatten(-1, (2, 8)).transpose(1, 2)
    rotated = _rotate(heads, _rotation(3, LENGTH, 8, torch.device("cpu")))
    torch.testing.assert_close(rotated.norm(dim=-1), heads.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only(x_BTH: Tensor) -> None:
    torch.manual_seed(0)
    transformer = Transformer(WIDTH, num_layers=1, num_heads=2, dropout=0.5)
    assert not torch.equal(transformer(x_BTH), transformer(x_BTH))
    transformer.eval()
    assert torch.equal(transformer(x_BTH), transformer(x_BTH))


def test_gradients_reach_every_parameter(x_BTH: Tensor) -> None:
    torch.manual_seed(0)
    transformer = Transformer(WIDTH, num_layers=2, num_heads=2)
    transformer(x_BTH).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in transformer.parameters())
