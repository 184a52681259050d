"""What holds for every quantiser: one call signature, tokens of known range, padding without a say, equal workers.

Shape legend: N vectors, K values, L tokens, V codes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.config import ConfigError, load_config
from raywgen.nn.quantisers import (
    AllReduce,
    Quantiser,
    QuantiserConfig,
    build_quantiser,
)
from raywgen.weights import KeyedNoise

K = 8
CONFIGS: dict[str, Callable[[int], QuantiserConfig]] = {
    "residual": lambda beam: QuantiserConfig(num_levels=2, num_codes=8, decay=0.8, beam=beam, revive_below=0.3),
    "gumbel": lambda _: QuantiserConfig(kind="gumbel", num_levels=2, num_codes=8),
    "finite_scalar": lambda _: QuantiserConfig(kind="finite_scalar", num_levels=4, num_codes=25),
}
KINDS = sorted(CONFIGS)


def built(kind: str, beam: int = 3) -> Quantiser:
    torch.manual_seed(0)
    quantiser = build_quantiser(CONFIGS[kind](beam), K)
    quantiser.initialise(vectors(), 3, torch.Generator().manual_seed(0))
    return quantiser


def vectors(num: int = 120, seed: int = 0) -> Tensor:
    return torch.randn(num, K, generator=torch.Generator().manual_seed(seed))


def half_padded(num: int) -> Tensor:
    mask_NK = torch.ones(num, K)
    mask_NK[num // 2 :, K // 2 :] = 0.0
    return mask_NK


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_tokens_and_come_back_better_than_nothing(kind: str) -> None:
    quantiser, vectors_NK = built(kind), vectors(seed=1)
    codes_NL = quantiser.encode(vectors_NK)
    assert codes_NL.dtype == torch.int64
    assert codes_NL.shape == (120, quantiser.num_tokens)
    assert 0 <= int(codes_NL.min()) <= int(codes_NL.max()) < quantiser.num_codes
    decoded_NK = quantiser.decode(codes_NL).detach()
    assert decoded_NK.dtype == torch.float32
    assert float((decoded_NK - vectors_NK).square().mean()) < 0.8 * float(vectors_NK.square().mean())
    assert torch.equal(quantiser.decode(codes_NL.view(4, 30, -1)).flatten(0, 1), decoded_NK)
    assert quantiser.num_codebook_values > 0


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1000), num=st.integers(1, 9))
@settings(max_examples=10)
def test_a_vector_s_code_does_not_depend_on_its_neighbours(kind: str, seed: int, num: int) -> None:
    quantiser, vectors_NK = built(kind), vectors(num, seed)
    one_by_one = torch.cat([quantiser.encode(vectors_NK[i : i + 1]) for i in range(num)])
    # Sums in another order may turn a tie between two codes: then both are equally good.
    errors = [
        (quantiser.decode(codes) - vectors_NK).square().sum(1) for codes in (one_by_one, quantiser.encode(vectors_NK))
    ]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_say_in_codes_losses_and_statistics(kind: str) -> None:
    mask_NK = half_padded(40)
    clean_NK = vectors(40) * mask_NK
    garbage_NK = torch.where(mask_NK > 0, clean_NK, torch.tensor(77.0))
    states = []
    for vectors_NK in (clean_NK, garbage_NK):
        quantiser = built(kind).train()
        out = quantiser(vectors_NK, mask_NK, KeyedNoise(0, torch.arange(40)).gumbel)
        quantiser.update(lambda tensor: tensor)
        states.append({**quantiser.state_dict(), "codes": quantiser.encode(vectors_NK, mask_NK), "loss": out.loss})
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_spends_no_accuracy(kind: str) -> None:
    quantiser, mask_NK = built(kind), half_padded(40)
    vectors_NK = torch.where(mask_NK > 0, vectors(40), torch.tensor(3.0))
    decoded_NK = [quantiser.decode(quantiser.encode(vectors_NK, mask)) for mask in (mask_NK, None)]
    errors = [float(((decoded.detach() - vectors_NK).square() * mask_NK).sum()) for decoded in decoded_NK]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gumbel"])
def test_gradients_pass_straight_through(kind: str) -> None:
    quantiser, vectors_NK = built(kind).eval(), vectors(10).requires_grad_()
    out = quantiser(vectors_NK)
    torch.testing.assert_close(out.vectors_NK, quantiser.decode(out.codes_NL))
    out.vectors_NK.backward(torch.full((10, K), 3.0))
    assert vectors_NK.grad is not None
    assert torch.equal(vectors_NK.grad, torch.full((10, K), 3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_calls_initialise_equally_and_state_is_float32(kind: str) -> None:
    first, second = built(kind).state_dict(), built(kind).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert tensor.dtype in (torch.float32, torch.int64), name


def trained(kind: str, parts: slice, all_reduce: AllReduce) -> dict[str, Tensor]:
    """State after steps on vectors that move away from the codes, so that some die and are revived."""
    quantiser = built(kind).train()
    for step in range(6):
        quantiser((0.3 * vectors(64, seed=10 + step) + step)[parts])
        quantiser.update(all_reduce)
    return quantiser.state_dict()


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def all_reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    states = {kind: trained(kind, slice(rank, None, 2), all_reduce) for kind in ("residual",)}
    torch.save(states, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_real_processes_hold_bit_equal_state(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for kind, state in first.items():
        start = built(kind).state_dict()
        for name, tensor in state.items():
            assert torch.equal(tensor, second[kind][name]), (kind, name)
            assert not torch.equal(tensor, start[name]), (kind, name)
    # A revived code starts again with a count of 1: the two workers did revive some.
    assert int((first["residual"]["counts_LV"] == 1.0).sum()) > 0


def test_a_config_names_its_kind_or_says_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "quantiser.yaml"
    path.write_text("{kind: gumbel, num_levels: 4, num_codes: 256}\n")
    quantiser = build_quantiser(load_config(QuantiserConfig, path), 16)
    assert (quantiser.num_tokens, quantiser.num_codes) == (4, 256)
    path.write_text("{kind: vq}\n")
    with pytest.raises(ConfigError, match="residual, gumbel, finite_scalar"):
        load_config(QuantiserConfig, path)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_levels": 0}, "num_levels=0"),
        ({"num_codes": 1}, "num_codes=1"),
        ({"beam": 0}, "beam=0"),
        ({"revive_below": 1.0}, "revive_below=1.0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"kind": "gumbel", "num_levels": 3}, "must divide chunk_length=16"),
        ({"kind": "finite_scalar", "num_codes": 200}, "such as 196"),
        ({"kind": "finite_scalar", "num_codes": 1 << 26}, "at most 16777216 codes"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        QuantiserConfig(**settings).check_width(16, "chunk_length")
