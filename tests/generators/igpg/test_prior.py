"""The prior: a proper distribution, the same when written and when read, with a differentiable expectation.

Shape legend: B networks, M chunks, K values of a chunk, L levels, V codes, H width, G place features.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from raywgen.generators.common.tokenizer.chunk_table import ChunkTable
from raywgen.generators.igpg.config import PriorConfig
from raywgen.generators.igpg.prior import Prior
from raywgen.generators.igpg.token_sampling import TokenSample, sample_tokens
from raywgen.nn.quantisers import ResidualQuantiser
from raywgen.weights import Condition
from tests.builders import DATA, condition, level_logits, noise_for, part_of

# With two levels, the second would get the same input from a sum over all before and from the last one alone.
NUM_CHUNKS, NUM_LEVELS, NUM_CODES, LENGTH = 2, 3, 3, 4


@pytest.fixture(scope="module")
def prior() -> Prior:
    torch.manual_seed(0)
    config = PriorConfig(width=16, num_layers=2, num_heads=2, dropout=0.2)
    built = Prior(config, NUM_LEVELS, NUM_CODES, LENGTH, DATA).eval()
    with torch.no_grad():
        # Far from uniform, so that a mix-up of codes or levels would show.
        for parameter in (built.head.query, built.head.free, built.head.bias):
            parameter.normal_(std=0.5)
    return built


@pytest.fixture(scope="module")
def hidden_BMH(prior: Prior, cond: Condition, table: ChunkTable, rvq: ResidualQuantiser, sample: TokenSample) -> Tensor:
    with torch.no_grad():
        return prior.hidden(sample.codes_BML, cond, table, rvq)


@pytest.fixture(scope="module")
def sample(prior: Prior, cond: Condition, table: ChunkTable, rvq: ResidualQuantiser) -> TokenSample:
    return sample_tokens(prior, cond, table, rvq, noise_for(4), temperature=1.0)


def test_probabilities_of_all_token_sequences_sum_to_one(prior, rvq, table) -> None:
    every = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=NUM_CHUNKS * NUM_LEVELS)))
    codes_BML = every.view(-1, NUM_CHUNKS, NUM_LEVELS)
    cond = condition(1).repeat(len(codes_BML))
    with torch.no_grad():
        hidden_BMH = prior.hidden(codes_BML, cond, table, rvq)
        log_p_B = prior.head.log_likelihood(hidden_BMH, codes_BML, rvq).double().sum(dim=(1, 2))
    assert float(log_p_B.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(log_p_B.exp().std()) > 1e-4


def test_a_sample_gives_the_log_prob_of_its_own_tokens(prior, rvq, table, cond, sample) -> None:
    with torch.no_grad():
        hidden_BMH = prior.hidden(sample.codes_BML, cond, table, rvq)
        log_p_BML = prior.head.log_likelihood(hidden_BMH, sample.codes_BML, rvq)
        # Cached and full attention round differently.
        expected_BMK = prior.head.expected_latents(hidden_BMH, rvq)
    torch.testing.assert_close(sample.log_prob_BM, log_p_BML.sum(dim=2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample.expected_BMK, expected_BMK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_log_prob_is_that_of_temperature_one(prior, rvq, table, cond, temperature) -> None:
    drawn = sample_tokens(prior, cond, table, rvq, noise_for(4), temperature)
    with torch.no_grad():
        hidden_BMH = prior.hidden(drawn.codes_BML, cond, table, rvq)
        log_p_BML = prior.head.log_likelihood(hidden_BMH, drawn.codes_BML, rvq)
    torch.testing.assert_close(drawn.log_prob_BM, log_p_BML.sum(dim=2), rtol=1e-4, atol=1e-4)


def test_tokens_see_earlier_chunks_only(prior, rvq, table, cond, sample) -> None:
    codes_BML = sample.codes_BML.clone()
    codes_BML[:, 1] = (codes_BML[:, 1] + 1) % NUM_CODES
    with torch.no_grad():
        before, after = (prior.hidden(codes, cond, table, rvq) for codes in (sample.codes_BML, codes_BML))
        assert torch.equal(before, after)  # the last chunk's tokens are inputs of nothing
        codes_BML[:, 0] = (codes_BML[:, 0] + 1) % NUM_CODES
        changed = prior.hidden(codes_BML, cond, table, rvq)
    assert torch.equal(changed[:, 0], before[:, 0])
    assert not torch.allclose(changed[:, 1], before[:, 1], atol=1e-4)


def test_expected_latents_against_a_loop_over_all_codes(prior, rvq, hidden_BMH) -> None:
    head = prior.head
    with torch.no_grad():
        expected_BMK = head.expected_latents(hidden_BMH, rvq)
        for b, m in itertools.product(range(4), range(NUM_CHUNKS)):
            so_far_K = torch.zeros(LENGTH)
            for level in range(NUM_LEVELS):
                logits_V = level_logits(head, hidden_BMH[b, m], so_far_K, level, rvq)
                p_V = logits_V.exp() / logits_V.exp().sum()
                mean_K = torch.zeros(LENGTH)
                for code in range(NUM_CODES):
                    mean_K = mean_K + p_V[code] * rvq.codebooks_LVK[level, code]
                so_far_K = so_far_K + mean_K
            torch.testing.assert_close(expected_BMK[b, m], so_far_K, rtol=1e-4, atol=1e-5)


def test_with_certain_tokens_the_expected_code_is_their_code(rvq, hidden_BMH) -> None:
    torch.manual_seed(0)
    config = PriorConfig(width=16, num_layers=1, num_heads=2)
    head = Prior(config, NUM_LEVELS, NUM_CODES, LENGTH, DATA).head
    certain_L = torch.tensor([2, 1, 0])
    with torch.no_grad():
        for parameter in (head.query, head.free):
            parameter.zero_()
        head.bias.copy_(1e4 * torch.nn.functional.one_hot(certain_L, NUM_CODES))
        expected_BMK = head.expected_latents(hidden_BMH, rvq)
    codes_BML = certain_L.expand(*expected_BMK.shape[:2], -1)
    torch.testing.assert_close(expected_BMK, rvq.decode(codes_BML), rtol=0, atol=1e-6)


def test_temperature_zero_ignores_the_noise_and_takes_the_likeliest(prior, rvq, table, cond) -> None:
    first, second = (sample_tokens(prior, cond, table, rvq, noise_for(4, seed), 0.0) for seed in (1, 2))
    assert torch.equal(first.codes_BML, second.codes_BML)
    with torch.no_grad():
        zeros_BK = torch.zeros(4, LENGTH)
        states_BMH = prior.hidden(first.codes_BML, cond, table, rvq)
        likeliest_B = level_logits(prior.head, states_BMH[:, 0], zeros_BK, 0, rvq).argmax(dim=-1)
    assert torch.equal(first.codes_BML[:, 0, 0], likeliest_B)


def test_noise_changes_the_tokens(prior, rvq, table, cond) -> None:
    first, second = (sample_tokens(prior, cond, table, rvq, noise_for(4, seed), 1.0) for seed in (1, 2))
    assert not torch.equal(first.codes_BML, second.codes_BML)


def test_four_networks_at_once_are_two_and_two(prior, rvq, table, cond, sample) -> None:
    for part in (slice(0, 2), slice(2, 4)):
        alone = sample_tokens(prior, part_of(cond, part), table, rvq, noise_for(2, first=part.start), 1.0)
        assert torch.equal(alone.codes_BML, sample.codes_BML[part])
        torch.testing.assert_close(alone.log_prob_BM, sample.log_prob_BM[part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_chunks_tokens_are_drawn_with_their_probability(prior, rvq, table, temperature: float) -> None:
    """Both levels together: noise that two levels shared would leave each level's shares as they are."""
    num = 4000
    cond = condition(1).repeat(num)
    first_1 = ChunkTable(positions_MG=table.positions_MG[:1])
    drawn = sample_tokens(prior, cond, first_1, rvq, noise_for(num, seed=5), temperature)
    with torch.no_grad():
        state_H = prior.hidden(drawn.codes_BML[:1], condition(1), first_1, rvq)[0, 0]
        p_V = (level_logits(prior.head, state_H, torch.zeros(LENGTH), 0, rvq) / temperature).softmax(dim=-1)
        state_VH = state_H.expand(NUM_CODES, -1)
        p_VV = (level_logits(prior.head, state_VH, rvq.codebooks_LVK[0], 1, rvq) / temperature).softmax(dim=-1)
    pair_B = drawn.codes_BML[:, 0, 0] * NUM_CODES + drawn.codes_BML[:, 0, 1]
    share_VV = torch.bincount(pair_B, minlength=NUM_CODES**2).view(NUM_CODES, NUM_CODES) / num
    # Four standard deviations of a share near 1/2 of 4000 draws are 0.032.
    torch.testing.assert_close(share_VV, p_V.unsqueeze(1) * p_VV, rtol=0, atol=0.032)


def test_with_tokens_that_are_known_before_probabilities_still_sum_to_one(prior, rvq, table) -> None:
    every = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=NUM_CHUNKS * NUM_LEVELS)))
    codes_BML = every.view(-1, NUM_CHUNKS, NUM_LEVELS)
    known = ChunkTable(positions_MG=table.positions_MG, padding_codes_ML=torch.tensor([[-1, 2, -1], [-1, -1, -1]]))
    with torch.no_grad():
        log_p_BM = prior.log_likelihood(codes_BML, condition(1).repeat(len(codes_BML)), known, rvq)
    p_B = log_p_BM.double().sum(dim=1).exp()
    is_possible_B = codes_BML[:, 0, 1] == 2
    assert float(p_B[is_possible_B].sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(p_B[~is_possible_B].max()) == 0.0
