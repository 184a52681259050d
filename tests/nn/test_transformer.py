"""The causal transformer: nothing looks ahead, and the cache changes nothing.

Shape legend: B sequences, T positions, A heads, E width of a head, H width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raywgen.nn.transformer import Transformer, rotated, rotation_of

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


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(2, 4, 3), (1, 8), (4, 1, 4)])
def test_a_cache_is_continued_by_any_number_of_positions(
    x_BTH: Tensor, lengths: tuple[int, ...], num_kv_heads: int
) -> None:
    torch.manual_seed(0)
    transformer = Transformer(WIDTH, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads).eval()
    cache = transformer.new_cache(len(x_BTH), LENGTH)
    assert cache.keys.shape[2] == num_kv_heads
    parts = [transformer(part, cache) for part in x_BTH.split(lengths, dim=1)]
    # As above.
    torch.testing.assert_close(torch.cat(parts, dim=1), transformer(x_BTH), rtol=1e-5, atol=1e-5)


def test_grouped_heads_are_full_heads_whose_keys_and_values_repeat(x_BTH: Tensor) -> None:
    torch.manual_seed(0)
    grouped = Transformer(WIDTH, num_layers=2, num_heads=4, num_kv_heads=2).eval()
    full = Transformer(WIDTH, num_layers=2, num_heads=4).eval()
    state = dict(grouped.state_dict())
    for name in [name for name in state if name.endswith("qkv.weight")]:
        query, key, value = state[name].split([WIDTH, WIDTH // 2, WIDTH // 2])
        wide = [part.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (key, value)]
        state[name] = torch.cat([query, *wide])
    full.load_state_dict(state)
    # Products of other shapes round differently.
    torch.testing.assert_close(grouped(x_BTH), full(x_BTH), rtol=1e-5, atol=1e-5)


def test_a_repeated_cache_continues_each_sequence(transformer: Transformer, x_BTH: Tensor) -> None:
    cache = transformer.new_cache(len(x_BTH), 4)
    transformer(x_BTH[:, :3], cache)
    twice = cache.repeat(2, LENGTH)
    parts = transformer(x_BTH[:, 3:].repeat_interleave(2, dim=0), twice)
    assert twice.length == LENGTH
    assert cache.length == 3
    expected = transformer(x_BTH)[:, 3:].repeat_interleave(2, dim=0)
    torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_cache_holds_half_the_bytes_and_stays_near(transformer: Transformer, x_BTH: Tensor) -> None:
    full, half = (transformer.new_cache(len(x_BTH), LENGTH, dtype) for dtype in (None, torch.bfloat16))
    outputs = [torch.cat([transformer(x, cache) for x in x_BTH.split(1, dim=1)], dim=1) for cache in (full, half)]
    assert half.keys.nbytes * 2 == full.keys.nbytes
    assert outputs[1].dtype == torch.float32
    # Eight bits of mantissa in keys, values and queries of three layers, at outputs of size 1.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0.05)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("shift", [1, 5, 40])
def test_rotary_scores_depend_on_distance_alone(shift: int) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def scores(start: int) -> Tensor:
        rotation = rotation_of(start, 6, 8, torch.device("cpu"))
        rotated_query, rotated_key = (rotated(x.expand(1, 1, 6, 8), rotation) for x in (query, key))
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
    turned = rotated(heads, rotation_of(3, LENGTH, 8, torch.device("cpu")))
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_one_layer_knows_the_order_of_what_it_sees(x_BTH: Tensor, is_causal: bool) -> None:
    """Without rotary positions the last output of a single layer is the same for every order of the others."""
    torch.manual_seed(0)
    transformer = Transformer(WIDTH, num_layers=1, num_heads=2, is_causal=is_causal).eval()
    swapped_BTH = x_BTH[:, [1, 0, *range(2, LENGTH)]]
    difference_BH = transformer(x_BTH)[:, -1] - transformer(swapped_BTH)[:, -1]
    assert float(difference_BH.detach().abs().max()) > 1e-2


def test_a_layer_is_attention_over_rotated_queries_and_keys_written_out() -> None:
    """Against loops over heads and positions, with RoPE as multiplication of complex numbers (Su et al. 2021)."""
    torch.manual_seed(0)
    transformer = Transformer(WIDTH, num_layers=1, num_heads=2).double().eval()
    block = transformer.get_submodule("blocks.0")
    x_TH = torch.randn(5, WIDTH, dtype=torch.float64)
    normed_TH = x_TH / (x_TH.square().mean(dim=1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
    state = dict(block.named_parameters())
    qkv = (normed_TH * state["attention_norm.weight"]) @ state["qkv.weight"].T
    width = WIDTH // 2
    heads = []
    for head in range(2):
        query, key, value = (qkv[:, part * WIDTH + head * width :][:, :width] for part in range(3))
        angle = torch.outer(torch.arange(5.0), 10_000.0 ** (-torch.arange(0, width, 2) / width)).double()
        turn = torch.polar(torch.ones_like(angle), angle)
        query, key = (torch.complex(*part.chunk(2, dim=1)) * turn for part in (query, key))
        rows = []
        for place in range(5):
            scores = torch.stack([(query[place] * key[k].conj()).real.sum() for k in range(place + 1)]) / width**0.5
            rows.append(scores.softmax(dim=0) @ value[: place + 1])
        heads.append(torch.stack(rows))
    mlp, mlp_norm = block.get_submodule("mlp"), block.get_submodule("mlp_norm")
    mixed_TH = x_TH + torch.cat(heads, dim=1) @ state["out.weight"].T
    hidden_TH = mixed_TH + mlp(mlp_norm(mixed_TH))
    # The angles are float32, as in the module: at most 5 rad.
    torch.testing.assert_close(transformer(x_TH.unsqueeze(0))[0], transformer.norm(hidden_TH), rtol=1e-5, atol=1e-6)


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


def test_positions_after_a_common_beginning_are_sequences_of_their_own() -> None:
    torch.manual_seed(0)
    transformer = Transformer(width=16, num_layers=2, num_heads=2).double()
    x_BTH = torch.randn(3, 2 + 5, 16, dtype=torch.float64)
    together_BTH = transformer(x_BTH, num_common=2)
    torch.testing.assert_close(together_BTH[:, :2], transformer(x_BTH[:, :2]))
    for place in range(2, 7):
        alone_BTH = transformer(x_BTH[:, [0, 1, place]])
        torch.testing.assert_close(together_BTH[:, place], alone_BTH[:, 2])
