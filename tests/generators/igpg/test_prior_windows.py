"""Windows: what they cover, that written and read tokens are equally likely, and that one window is the whole.

Shape legend: B networks, M chunks, W chunks of a window, K values of a chunk, L levels, V codes, G place features.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raywgen.generators.common.tokenizer.chunk_table import ChunkTable
from raywgen.generators.common.tokenizer.windows import random_windows
from raywgen.generators.igpg.config import PriorConfig, SamplingConfig
from raywgen.generators.igpg.prior import Prior
from raywgen.generators.igpg.token_sampling import sample_tokens
from raywgen.generators.igpg.windows import Window, plan_windows, side_by_side
from raywgen.weights import KeyedNoise
from tests.builders import DATA, condition, level_logits, noise_for, part_of

NUM_CHUNKS, NUM_LEVELS, NUM_CODES, LENGTH = 7, 2, 3, 4
WHOLE = SamplingConfig()
MODES = {
    "sequential": SamplingConfig(windows="sequential", overlap=0.5),
    "parallel": SamplingConfig(windows="parallel"),
    "parallel, two rows at a time": SamplingConfig(windows="parallel", max_rows=2),
    "independent": SamplingConfig(chunks="independent", max_rows=6),
}


def prior_of(window: int, **settings: float) -> Prior:
    """The same values whatever the window."""
    torch.manual_seed(0)
    config = PriorConfig(width=16, num_layers=2, num_heads=4, num_kv_heads=2, window=window, **settings)  # pyright: ignore[reportArgumentType]
    built = Prior(config, NUM_LEVELS, NUM_CODES, LENGTH, DATA).eval()
    with torch.no_grad():
        for parameter in (built.head.query, built.head.free, built.head.bias):
            parameter.normal_(std=0.5)
    return built


@given(
    num_chunks=st.integers(1, 60),
    window=st.integers(0, 20),
    windows=st.sampled_from(["sequential", "parallel"]),
    chunks=st.sampled_from(["coherent", "independent"]),
    overlap=st.floats(0, 0.99),
    rows=st.integers(1, 30),
)
def test_every_chunk_is_written_once_in_order(num_chunks, window, windows, chunks, overlap, rows) -> None:
    sampling = SamplingConfig(windows=windows, chunks=chunks, overlap=overlap, max_rows=rows)
    plan = plan_windows(num_chunks, window, sampling)
    longest = 1 if chunks == "independent" else window or num_chunks
    written = [chunk for each in plan for chunk in range(each.new, each.stop)]
    assert written[:num_chunks] == list(range(num_chunks))
    assert len(written) - num_chunks < len(plan)  # padding is less than one chunk per window
    assert all(0 <= each.start <= each.new < each.stop <= each.start + longest for each in plan)
    groups = side_by_side(plan, 2, rows)
    assert [each for group in groups for each in group] == plan
    for group in groups:
        assert len(group) <= max(1, rows // 2)
        assert len({(each.new - each.start, each.stop - each.start) for each in group}) == 1


def test_sequential_windows_see_the_tail_of_the_one_before() -> None:
    plan = plan_windows(10, 4, SamplingConfig(overlap=0.5))
    assert plan == [Window(0, 0, 4), Window(2, 4, 6), Window(4, 6, 8), Window(6, 8, 10)]
    assert plan_windows(10, 4, SamplingConfig(overlap=0.0))[1] == Window(3, 4, 7)


def test_parallel_windows_are_equally_long() -> None:
    plan = plan_windows(9, 8, SamplingConfig(windows="parallel"))
    assert plan == [Window(0, 0, 5), Window(5, 5, 10)]


@pytest.mark.parametrize("window", [0, NUM_CHUNKS, NUM_CHUNKS + 3])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_window_as_long_as_the_network_is_the_whole_bit_for_bit(rvq, table, cond, window, mode) -> None:
    whole = sample_tokens(prior_of(0), cond, table, rvq, noise_for(4), 1.0, WHOLE)
    windowed = sample_tokens(prior_of(window), cond, table, rvq, noise_for(4), 1.0, SamplingConfig(windows=mode))
    assert torch.equal(windowed.codes_BML, whole.codes_BML)
    assert torch.equal(windowed.log_prob_BM, whole.log_prob_BM)
    assert whole.expected_BMK is not None
    assert windowed.expected_BMK is not None
    assert torch.equal(windowed.expected_BMK, whole.expected_BMK)
    with torch.no_grad():
        read = [
            prior_of(each).log_likelihood(whole.codes_BML, cond, table, rvq, SamplingConfig(windows=mode))
            for each in (0, window)
        ]
    assert torch.equal(*read)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [1, 2, 3, 4, 6])
def test_written_tokens_are_as_likely_as_the_same_tokens_read(rvq, table, cond, window, mode) -> None:
    prior, sampling = prior_of(window), MODES[mode]
    written = sample_tokens(prior, cond, table, rvq, noise_for(4), 1.0, sampling)
    with torch.no_grad():
        read_BM = prior.log_likelihood(written.codes_BML, cond, table, rvq, sampling)
        hidden_BMH = prior.hidden(written.codes_BML, cond, table, rvq, sampling)
        expected_BMK = prior.head.expected_latents(hidden_BMH, rvq)
    # Cached and full attention round differently.
    torch.testing.assert_close(written.log_prob_BM, read_BM, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(written.expected_BMK, expected_BMK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_windows_likelihood_is_that_of_a_sequence_of_its_own(rvq, table, cond, mode) -> None:
    """Computes each window by itself from the definition: prefix and chunks, no input before the first."""
    prior, sampling = prior_of(4), replace(MODES[mode])
    generator = torch.Generator().manual_seed(3)
    codes_BML = torch.randint(NUM_CODES, (4, NUM_CHUNKS, NUM_LEVELS), generator=generator)
    with torch.no_grad():
        read_BM = prior.log_likelihood(codes_BML, cond, table, rvq, sampling)
        prefix_BTH = prior.prefix(cond, table.positions_MG.mean(dim=0))
        for window in plan_windows(NUM_CHUNKS, 4, sampling):
            seen = slice(window.start, min(window.stop, NUM_CHUNKS))
            states = prior.states(prefix_BTH, table.positions_MG[seen], rvq.decode(codes_BML[:, seen]))
            log_p_BW = prior.head.log_likelihood(states, codes_BML[:, seen], rvq).sum(dim=-1)
            new = slice(window.new, seen.stop)
            torch.testing.assert_close(read_BM[:, new], log_p_BW[:, new.start - seen.start :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["sequential", "parallel", "independent"])
def test_a_chunk_depends_on_what_its_window_holds_before_it_alone(rvq, table, cond, mode) -> None:
    prior, sampling = prior_of(4), MODES[mode]
    plan = plan_windows(NUM_CHUNKS, 4, sampling)
    generator = torch.Generator().manual_seed(3)
    codes_BML = torch.randint(NUM_CODES, (4, NUM_CHUNKS, NUM_LEVELS), generator=generator)
    with torch.no_grad():
        before = prior.hidden(codes_BML, cond, table, rvq, sampling)
        for changed in range(NUM_CHUNKS):
            other_BML = codes_BML.clone()
            other_BML[:, changed] = (other_BML[:, changed] + 1) % NUM_CODES
            after = prior.hidden(other_BML, cond, table, rvq, sampling)
            seen = {m for each in plan for m in range(each.new, each.stop) if each.start <= changed < m}
            for m in range(NUM_CHUNKS):
                assert torch.equal(before[:, m], after[:, m]) == (m not in seen), (changed, m)


@pytest.mark.parametrize("mode", ["parallel", "independent"])
def test_how_many_windows_are_written_at_once_changes_nothing(rvq, table, cond, mode) -> None:
    prior = prior_of(3)
    first, *others = (
        sample_tokens(prior, cond, table, rvq, noise_for(4), 1.0, replace(MODES[mode], max_rows=rows))
        for rows in (1, 8, 1000)
    )
    for other in others:
        assert torch.equal(other.codes_BML, first.codes_BML)
        # Products of other batch sizes round differently.
        torch.testing.assert_close(other.log_prob_BM, first.log_prob_BM, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_four_networks_at_once_are_two_and_two(rvq, table, cond, mode) -> None:
    prior = prior_of(3)
    together = sample_tokens(prior, cond, table, rvq, noise_for(4), 1.0, MODES[mode])
    for part in (slice(0, 2), slice(2, 4)):
        alone = sample_tokens(prior, part_of(cond, part), table, rvq, noise_for(2, first=part.start), 1.0, MODES[mode])
        assert torch.equal(alone.codes_BML, together.codes_BML[part])


def test_independent_chunks_are_drawn_with_their_probability(rvq, table) -> None:
    num, prior = 4000, prior_of(0)
    cond = condition(1).repeat(num)
    first_2, alone = ChunkTable(positions_MG=table.positions_MG[:2]), SamplingConfig(chunks="independent")
    drawn = sample_tokens(prior, cond, first_2, rvq, noise_for(num, seed=5), 1.0, alone)
    with torch.no_grad():
        prefix_BTH = prior.prefix(condition(1), table.positions_MG[:2].mean(dim=0))
        zeros_11K = torch.zeros(1, 1, LENGTH)
        states = [prior.states(prefix_BTH, table.positions_MG[m : m + 1], zeros_11K)[0, 0] for m in range(2)]
        p_MV = torch.stack([level_logits(prior.head, state, torch.zeros(LENGTH), 0, rvq) for state in states]).softmax(
            -1
        )
    both_VV = torch.zeros(NUM_CODES, NUM_CODES)
    first_BM = drawn.codes_BML[:, :, 0]
    both_VV.index_put_((first_BM[:, 0], first_BM[:, 1]), torch.ones(num), accumulate=True)
    # Four standard deviations of a share of 1/2 of 4000 draws are 0.032; the joint is the product of the two.
    torch.testing.assert_close(both_VV / num, p_MV[0].unsqueeze(1) * p_MV[1], rtol=0, atol=0.032)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_random_windows_lie_inside_and_hold_every_chunk_often_enough(window: int) -> None:
    num = 6000
    index_BW = random_windows(KeyedNoise(0, torch.arange(num)), NUM_CHUNKS, window)
    assert index_BW.shape == (num, window)
    assert int(index_BW.min()) == 0
    assert int(index_BW.max()) == NUM_CHUNKS - 1
    assert bool((index_BW.diff(dim=1) == 1).all())
    share_M = torch.bincount(index_BW.flatten(), minlength=NUM_CHUNKS) / num
    # Four standard deviations of a share near 1/2 of 6000 draws are 0.026.
    assert float(share_M.min()) > window / (NUM_CHUNKS + window - 1) - 0.026
