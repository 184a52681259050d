"""Trellis-coded quantisation: the best path by brute force, windows of bits by hand, and known distances to the bound.

Shape legend: N sequences, K values, L tokens, Q states.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.nn.quantisers import TrellisConfig, TrellisQuantiser
from raywgen.nn.quantisers.trellis import gaussian_table, viterbi


def quantiser(bits: int, state_bits: int, width: int, values_per_token: int = 1) -> TrellisQuantiser:
    config = TrellisConfig(bits=bits, state_bits=state_bits, values_per_token=values_per_token)
    return TrellisQuantiser(config, width)


def gaussian(num: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def snr_db(trellis: TrellisQuantiser, vectors_NK: Tensor) -> float:
    error_NK = trellis.decode(trellis.encode(vectors_NK)) - vectors_NK
    return float(10 * torch.log10(vectors_NK.square().sum() / error_NK.square().sum()))


def windows(symbols: list[int], bits: int, state_bits: int) -> list[int]:
    """States of a tail-biting sequence, as text: the S bits that end with each symbol."""
    text = "".join(format(symbol, f"0{bits}b") for symbol in symbols)
    turned = text * (1 + math.ceil(state_bits / len(text)))
    shift = len(turned) - len(text)
    return [int(turned[: shift + bits * (i + 1)][-state_bits:], 2) for i in range(len(symbols))]


@pytest.mark.parametrize(("bits", "state_bits", "length"), [(1, 3, 7), (2, 4, 4), (2, 3, 4), (3, 3, 3)])
@pytest.mark.parametrize("overlap", [None, 1])
def test_viterbi_finds_the_best_path_by_brute_force(
    bits: int, state_bits: int, length: int, overlap: int | None
) -> None:
    table_Q = torch.randn(1 << state_bits, generator=torch.Generator().manual_seed(3))
    values_NK = gaussian(6, length)
    num_prefixes = 1 << (state_bits - bits)
    overlap = None if overlap is None else overlap % num_prefixes
    start_N = None if overlap is None else torch.full((6,), overlap)
    states_NK = viterbi(values_NK, table_Q, bits, start_N)
    found_N = (table_Q[states_NK] - values_NK).square().double().sum(1)
    paths = []
    for prefix in range(num_prefixes) if overlap is None else [overlap]:
        for symbols in itertools.product(range(1 << bits), repeat=length):
            path, low = [], prefix
            for symbol in symbols:
                path.append(low << bits | symbol)
                low = path[-1] % num_prefixes
            if overlap is None or low == overlap:
                paths.append(path)
    errors_NX = (table_Q[torch.tensor(paths)] - values_NK.unsqueeze(1)).square()
    torch.testing.assert_close(found_N, errors_NX.double().sum(2).min(dim=1).values, rtol=1e-5, atol=1e-5)
    followers = states_NK[:, 1:] >> bits
    assert torch.equal(followers, states_NK[:, :-1] % num_prefixes)
    if overlap is not None:
        assert bool((states_NK[:, 0] >> bits == overlap).all())
        assert bool((states_NK[:, -1] % num_prefixes == overlap).all())


@given(data=st.data(), sizes=st.sampled_from([(1, 5, 8, 2), (2, 5, 6, 3), (3, 8, 4, 1), (2, 8, 4, 4)]))
@settings(max_examples=40)
def test_states_are_windows_of_the_token_bits(data: st.DataObject, sizes: tuple[int, int, int, int]) -> None:
    bits, state_bits, width, values_per_token = sizes
    trellis = quantiser(bits, state_bits, width, values_per_token)
    tokens = data.draw(
        st.lists(
            st.integers(0, (1 << trellis.bits_per_token) - 1), min_size=trellis.num_tokens, max_size=trellis.num_tokens
        )
    )
    text = "".join(format(token, f"0{bits * values_per_token}b") for token in tokens)
    symbols = [int(text[i : i + bits], 2) for i in range(0, len(text), bits)]
    codes_NL = torch.tensor([tokens])
    assert trellis.states(codes_NL)[0].tolist() == windows(symbols, bits, state_bits)
    assert torch.equal(trellis.decode(codes_NL)[0], trellis.table_Q[trellis.states(codes_NL)[0]])


def test_tail_biting_codes_are_nearly_the_best_of_all() -> None:
    trellis = quantiser(1, 3, 10)
    vectors_NK = gaussian(100, 10)
    every_CL = torch.tensor(list(itertools.product(range(2), repeat=10)))
    errors_NC = (trellis.decode(every_CL) - vectors_NK.unsqueeze(1)).square().sum(2)
    best_N = errors_NC.min(dim=1).values
    found_N = (trellis.decode(trellis.encode(vectors_NK)) - vectors_NK).square().sum(1)
    assert bool((found_N >= best_N - 1e-4).all())
    # The state where the ends meet is guessed from a first search: measured 4.2 % above the best, 75 of 100 equal it.
    assert float(found_N.sum()) < 1.08 * float(best_N.sum())
    assert float((found_N <= best_N + 1e-4).float().mean()) > 0.65


def test_codes_are_tokens_of_the_bits_that_were_paid_for() -> None:
    trellis = quantiser(2, 6, 16, values_per_token=4)
    codes_NL = trellis.encode(gaussian(5, 16))
    assert codes_NL.dtype == torch.int64
    assert codes_NL.shape == (5, trellis.num_tokens) == (5, 4)
    assert trellis.bits_per_token == 8
    assert 0 <= int(codes_NL.min()) <= int(codes_NL.max()) < 256


def test_tokens_of_other_lengths_hold_the_same_bits() -> None:
    vectors_NK = gaussian(4, 16)
    decoded = [quantiser(2, 6, 16, length) for length in (1, 2, 8)]
    first, *others = [trellis.decode(trellis.encode(vectors_NK)) for trellis in decoded]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("bits", "floor_db"), [(1, 4.40), (2, 9.30), (4, 20.22)])
def test_it_beats_the_best_scalar_quantiser_on_a_gaussian(bits: int, floor_db: float) -> None:
    # Lloyd-Max: Max 1960, table I. Measured 5.3, 11.0 and 21.9 dB; 0.5 dB leaves room for another sample.
    assert snr_db(quantiser(bits, 8, 128), gaussian(64, 128)) > floor_db + 0.5


def test_more_states_come_closer_to_the_bound() -> None:
    vectors_NK = gaussian(64, 128)
    snrs = [snr_db(quantiser(2, state_bits, 128), vectors_NK) for state_bits in (4, 6, 8, 10)]
    assert all(later > earlier + 0.1 for earlier, later in itertools.pairwise(snrs))
    # 6.02 dB per bit; measured 0.78 dB below it.
    assert 2 * 6.0206 - snrs[-1] < 1.0


def test_choices_of_a_path_lie_in_different_strata() -> None:
    config = TrellisConfig(bits=2, state_bits=6)
    table_Q = gaussian_table(config)
    rank_Q = table_Q.argsort().argsort()
    stratum_Q = rank_Q // 16
    for prefix in range(16):
        assert sorted(stratum_Q[prefix * 4 : prefix * 4 + 4].tolist()) == [0, 1, 2, 3]
        assert sorted(stratum_Q[prefix::16].tolist()) == [0, 1, 2, 3]
    assert sorted(rank_Q.tolist()) == list(range(64))
    assert float(table_Q.mean()) == pytest.approx(0.0, abs=1e-6)


def test_equal_seeds_give_equal_tables_and_others_do_not() -> None:
    tables = [gaussian_table(TrellisConfig(seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize(
    ("change", "width", "word"),
    [
        ({"state_bits": 1, "bits": 2}, 8, "bits <= state_bits"),
        ({"state_bits": 30}, 8, "state_bits <= 20"),
        ({"values_per_token": 9}, 9, "24 bits"),
        ({"values_per_token": 3}, 8, "multiple"),
        ({"bits": 1, "state_bits": 12, "values_per_token": 1}, 8, "at least"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(change: dict[str, int], width: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        TrellisQuantiser(TrellisConfig(**change), width)
