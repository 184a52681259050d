"""Windows that are conditioned on the scales of their values: these are right, and written and read tokens agree.

Shape legend: B networks, M chunks, W chunks of a window, K values of a chunk, F condition values of a chunk.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen.generators import GenerationRequest
from raywgen.generators.common.tokenizer.chunk_table import HeaderChunks
from raywgen.generators.common.tokenizer.scales import scaled_chunks
from raywgen.generators.common.tokenizer.windows import random_windows
from raywgen.generators.igpg import IGPG, SamplingConfig
from raywgen.generators.igpg.likelihood import token_nll
from raywgen.generators.igpg.stages import IGPGTaskLossStage, PriorStage
from raywgen.generators.igpg.token_sampling import sample_tokens
from raywgen.generators.igpg.windows import plan_parts
from raywgen.weights import Normalizer, layout_normalizer
from raywgen.weights.groups import groups_of
from tests.builders import (
    SMALL,
    condition,
    igpg,
    igpg_config,
    layout_of,
    noise_for,
    normalizers,
    part_of,
    train,
    values_of,
    weight_batch,
)

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = (6, 20, 2)
NUM = 4
MODES = {
    "sequential": SamplingConfig(overlap=0.5),
    "parallel": SamplingConfig(windows="parallel"),
    "parallel, few rows": SamplingConfig(windows="parallel", max_rows=8),
    "independent": SamplingConfig(chunks="independent", max_rows=8),
}


def generator_of(window: int = 4, scales: str = "filter", **prior: Any) -> IGPG:
    config = igpg_config()
    config.tokenizer = dataclasses.replace(config.tokenizer, scales=scales)
    config.prior = dataclasses.replace(config.prior, window=window, **prior)
    built = igpg(config, normalizers(SMALL, WIDE))
    draws = torch.Generator().manual_seed(0)
    cond = [] if built.prior.scales is None else [built.prior.scales.weight]
    head = built.prior.head
    with torch.no_grad():
        for parameter in (*cond, head.query, head.free, head.bias):
            parameter.normal_(std=0.5, generator=draws)
        for parameter in built.tokenizer.decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return built


def chunk_scales(generator: IGPG, codes_BML: Tensor) -> Tensor:
    """Scale and mean at the ends of every chunk, `(B, M, F)`, through decoding and groups."""
    tokenizer, layout = generator.tokenizer, layout_of(WIDE)
    scaled = tokenizer.scaled(layout)
    assert scaled is not None
    chunks_BMK = tokenizer.decode(codes_BML, tokenizer.positions(layout), tokenizer.mask(layout))
    groups, lead, K = groups_of(layout, "filter"), scaled.num_header_chunks, 8
    num_means = -(-len(groups.with_mean) // K)
    means_BY, scales_BY = (part.flatten(1) for part in chunks_BMK[:, :lead].split([num_means, lead - num_means], dim=1))
    # Of one kind after another, as they lie in the network.
    kind = dict(enumerate(groups.kinds))
    mean_order = sorted(groups.with_mean, key=lambda group: kind[group])
    scale_order = sorted(range(len(groups.firsts)), key=lambda group: kind[group])
    cond = torch.zeros(len(codes_BML), len(chunks_BMK[0]), 4)
    for m in range(lead, cond.shape[1]):
        first = (m - lead) * K
        for end, value in enumerate((first, min(first + K - 1, layout.num_values - 1))):
            group = max(g for g, start in enumerate(groups.firsts) if start <= value)
            cond[:, m, 2 * end] = scales_BY[:, scale_order.index(group)]
            if group in mean_order:
                cond[:, m, 2 * end + 1] = means_BY[:, mean_order.index(group)]
    return cond


def test_the_scales_given_to_a_chunk_multiply_its_values() -> None:
    layout, values_BD = layout_of(WIDE), values_of(WIDE)[:NUM]
    for per in ("tensor", "filter"):
        scaled = scaled_chunks(layout, per, 8)
        chunks_BMK = scaled.encode(values_BD, lambda chunks, _: chunks)
        numbers_BY = chunks_BMK[:, : scaled.num_header_chunks].flatten(1)
        chunks_BMK[:, scaled.num_header_chunks :] = 0.0
        means_BD = scaled.decode(chunks_BMK)
        chunks_BMK[:, scaled.num_header_chunks :] = 1.0
        scale_BD = scaled.decode(chunks_BMK) - means_BD
        scale_index_M4 = scaled.scale_index(torch.arange(scaled.num_chunks))
        for m in range(scaled.num_header_chunks, scaled.num_chunks):
            first = (m - scaled.num_header_chunks) * 8
            for end, value in enumerate((first, min(first + 7, layout.num_values - 1))):
                scale, mean = scale_index_M4[m].view(2, 2)[end].tolist()
                written_B = (0.5 * numbers_BY[:, scale]).sinh().exp()
                torch.testing.assert_close(written_B, scale_BD[:, value], rtol=1e-4, atol=1e-6)
                mean_B = torch.zeros(NUM) if mean < 0 else numbers_BY[:, mean].sinh()
                torch.testing.assert_close(mean_B, means_BD[:, value], rtol=1e-4, atol=1e-6)
        assert bool((scale_index_M4[: scaled.num_header_chunks] == -1).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("scales", ["tensor", "filter"])
def test_written_tokens_are_as_likely_as_the_same_tokens_read(mode: str, window: int, scales: str) -> None:
    generator, sampling, cond = generator_of(window, scales), MODES[mode], condition(NUM)
    prior, rvq, table = generator.prior, generator.tokenizer.quantiser, generator.tokenizer.table(layout_of(WIDE))
    written = sample_tokens(prior, cond, table, rvq, noise_for(NUM), 1.0, sampling)
    with torch.no_grad():
        read_BM = prior.log_likelihood(written.codes_BML, cond, table, rvq, sampling)
        hidden_BMH = prior.hidden(written.codes_BML, cond, table, rvq, sampling)
        expected_BMK = prior.head.expected_latents(hidden_BMH, rvq)
    assert written.codes_BML.shape[1] == read_BM.shape[1] == len(table)
    # Cached and full attention round differently.
    torch.testing.assert_close(written.log_prob_BM, read_BM, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(written.expected_BMK, expected_BMK, rtol=1e-4, atol=1e-5)
    for part in (slice(0, 2), slice(2, 4)):
        alone = sample_tokens(prior, part_of(cond, part), table, rvq, noise_for(2, first=part.start), 1.0, sampling)
        assert torch.equal(alone.codes_BML, written.codes_BML[part])


@pytest.mark.parametrize("mode", MODES)
def test_a_windows_likelihood_is_that_of_a_sequence_of_its_own_given_its_scales(mode: str) -> None:
    generator, sampling, cond = generator_of(), MODES[mode], condition(NUM)
    prior, rvq, table = generator.prior, generator.tokenizer.quantiser, generator.tokenizer.table(layout_of(WIDE))
    codes_BML = torch.randint(8, (NUM, len(table), 2), generator=torch.Generator().manual_seed(3))
    numbers_BM4 = chunk_scales(generator, codes_BML)
    assert table.header is not None
    parts = plan_parts(len(table), table.header, 4, sampling)
    assert [part.stop for part in parts] == [table.header.num, len(table)]
    with torch.no_grad():
        read_BM = prior.log_likelihood(codes_BML, cond, table, rvq, sampling)
        prefix_BTH = prior.prefix(cond, table.positions_MG.mean(dim=0))
        for part, reads_scales in zip(parts, (0.0, 1.0), strict=True):
            for window in part.plan:
                seen = slice(window.start, min(window.stop, part.stop))
                latents_BWK = rvq.decode(codes_BML[:, seen])
                states = prior.states(
                    prefix_BTH, table.positions_MG[seen], latents_BWK, reads_scales * numbers_BM4[:, seen]
                )
                log_p_BW = prior.head.log_likelihood(states, codes_BML[:, seen], rvq).sum(dim=-1)
                new = slice(window.new, seen.stop)
                torch.testing.assert_close(read_BM[:, new], log_p_BW[:, new.start - seen.start :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_every_chunk_of_values_depends_on_its_scale(mode: str) -> None:
    generator, sampling, cond = generator_of(), MODES[mode], condition(NUM)
    prior, rvq, table = generator.prior, generator.tokenizer.quantiser, generator.tokenizer.table(layout_of(WIDE))
    header = table.header
    assert header is not None
    codes_BML = torch.randint(8, (NUM, len(table), 2), generator=torch.Generator().manual_seed(3))
    other_BML = codes_BML.clone()
    other_BML[:, : header.num] = (other_BML[:, : header.num] + 1) % 8
    with torch.no_grad():
        before, after = (prior.hidden(codes, cond, table, rvq, sampling) for codes in (codes_BML, other_BML))
    for m in range(header.num, len(table)):
        assert not torch.allclose(before[:, m], after[:, m], atol=1e-3), m


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("window", [4, 100])
def test_the_loss_of_random_windows_reads_the_scales_that_writing_reads(window: int, share: float) -> None:
    generator = generator_of(window, independent_share=share)
    tokenizer, prior, batch = generator.tokenizer, generator.prior, weight_batch(WIDE)
    codes_BML, table = generator.tokens(batch.values_BD, batch.layout), tokenizer.table(batch.layout)
    numbers_BM4, M, noise = chunk_scales(generator, codes_BML), len(table), noise_for(8)
    index_BW = random_windows(noise, M, window) if window < M else torch.arange(M).expand(8, -1)
    is_alone_B = noise.uniform(1)[:, 0] < share
    prefix_BTH = prior.prefix(batch.condition, table.positions_MG.mean(dim=0))
    assert table.header is not None
    losses, num_after = [], 0
    for b, index_W in enumerate(index_BW):
        codes_1WL, scales_1W4 = codes_BML[b : b + 1, index_W], numbers_BM4[b : b + 1, index_W]
        prefix, positions_1WG = prefix_BTH[b : b + 1], table.positions_MG[index_W].unsqueeze(0)
        if is_alone_B[b]:
            hidden = prior.states_alone(prefix, positions_1WG, scales_1W4)
        else:
            is_after = int(index_W[0]) >= table.header.num
            num_after += is_after
            latents_1WK = tokenizer.quantiser.decode(codes_1WL)
            hidden = prior.states(prefix, positions_1WG, latents_1WK, scales_1W4 if is_after else None)
        losses.append(-prior.head.log_likelihood(hidden, codes_1WL, tokenizer.quantiser).mean())
    assert (num_after > 0) == (window < M and share < 1)
    nll = token_nll(prior.train(), tokenizer, batch, generator.normalizers, noise_for(8))
    torch.testing.assert_close(nll, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_network_that_fits_one_window_sees_its_scales_and_needs_no_more(mode: str) -> None:
    generator, cond, layout = generator_of(), condition(NUM), layout_of(SMALL)
    generator = generator_of(generator.tokenizer.num_chunks(layout))
    before = generator.generate(
        GenerationRequest(condition=cond, layout=layout, noise=noise_for(NUM), sampling=MODES[mode])
    )
    assert generator.prior.scales is not None
    generator.prior.scales.weight.data.zero_()
    after = generator.generate(
        GenerationRequest(condition=cond, layout=layout, noise=noise_for(NUM), sampling=MODES[mode])
    )
    assert torch.equal(before.values_BD, after.values_BD)


def test_where_all_networks_fit_one_window_nothing_is_there_to_train() -> None:
    """A parameter that no loss reaches would stall ZeRO."""
    assert generator_of(100).prior.scales is None
    assert generator_of(100, independent_share=0.5).prior.scales is not None


@pytest.mark.parametrize(("window", "scales"), [(0, "filter"), (4, "normalizer")])
def test_only_windows_of_scale_tokens_are_given_scales(window: int, scales: str) -> None:
    assert generator_of(window, scales).prior.scales is None


def test_stages_train_it() -> None:
    generator = generator_of(4)
    stage = PriorStage(generator.prior, generator.tokenizer, generator.normalizers)
    losses = train(stage, [weight_batch(WIDE, 16, seed=step) for step in range(30)])
    assert sum(losses[-6:]) < 0.97 * sum(losses[:6])
    parts = (
        generator.prior,
        generator.residual_head,
        generator.sample_residual_head,
        generator.tokenizer,
        generator.normalizers,
    )
    task_loss = IGPGTaskLossStage(generator.config.task_loss, *parts)
    for each in (stage, task_loss):
        assert generator.prior.scales is not None
        generator.prior.scales.weight.grad = None
        each.train()(weight_batch(WIDE), noise_for(8)).loss.backward()
        gradient = generator.prior.scales.weight.grad
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0


def test_parts_hold_every_chunk_once_and_header_chunks_first() -> None:
    header = HeaderChunks(num=5, decode=lambda codes: codes, scale_index=lambda index_X: index_X)
    for sampling in MODES.values():
        for window in range(14):
            parts = plan_parts(14, header, window, sampling)
            is_cut = sampling.chunks == "independent" or window > 0
            assert [part.stop for part in parts] == ([5, 14] if is_cut else [14])
            written = [m for part in parts for each in part.plan for m in range(each.new, min(each.stop, part.stop))]
            assert written == list(range(14))
            assert all(each.start >= (0 if part.stop == parts[0].stop else 5) for part in parts for each in part.plan)
    assert [part.stop for part in plan_parts(14, None, 4, MODES["parallel"])] == [14]
    assert [part.stop for part in plan_parts(14, header, 14, MODES["parallel"])] == [14]


def test_layouts_that_share_no_start_are_given_their_scales_too() -> None:
    layout = layout_of(WIDE)
    table = {layout.id: (layout, Normalizer.measure(layout, values_of(WIDE), None))}
    config = generator_of().config
    generator = igpg(config, table)
    stranger = IGPG(config, {}, generator.data).eval()
    stranger.load_state_dict(generator.state_dict())
    normalizer, cond = layout_normalizer(layout), condition(NUM)
    one = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(NUM)))
    other = stranger.generate(
        GenerationRequest(condition=cond, layout=layout, noise=noise_for(NUM), normalizer=normalizer)
    )
    assert torch.equal(one.values_BD, other.values_BD)
