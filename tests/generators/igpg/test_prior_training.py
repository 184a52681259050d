"""How the prior is trained: random windows, left-out conditions, chunks on their own; equal for any workers.

Shape legend: B networks, M chunks, L levels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raywgen.config import ConfigError, load_config
from raywgen.generators import GenerationRequest
from raywgen.generators.bundle import load_bundle, save_bundle
from raywgen.generators.common.dropped import dropped_parts, with_dropped_parts
from raywgen.generators.igpg import IGPG, IGPGConfig, SamplingConfig
from raywgen.generators.igpg.config import IGPGTaskLossConfig
from raywgen.generators.igpg.likelihood import token_nll
from raywgen.generators.igpg.stages import IGPGTaskLossStage, PriorStage
from raywgen.weights import KeyedNoise, WeightBatch
from tests.builders import DEEP, SMALL, igpg, igpg_config, layout_of, noise_for, train, values_of, weight_batch

WAYS: dict[str, dict[str, Any]] = {
    "window": {"window": 2},
    "condition dropout": {"condition_dropout": 0.6},
    "independent": {"independent_share": 0.5},
    "all": {
        "window": 3,
        "condition_dropout": 0.6,
        "independent_share": 0.5,
        "num_kv_heads": 1,
        "text_encoder": "bytes",
    },
}


def generator_with(**settings: Any) -> IGPG:
    config = igpg_config()
    for name, value in settings.items():
        setattr(config.prior, name, value)
    return igpg(config)


def nll(generator: IGPG, batch: WeightBatch, noise: KeyedNoise) -> torch.Tensor:
    return token_nll(generator.prior.train(), generator.tokenizer, batch, generator.normalizers, noise)


def rows_of(batch: WeightBatch, part: slice) -> WeightBatch:
    """A worker's slice of a batch."""
    assert part.stop == len(batch.values_BD) or part.start == 0
    if part.start == 0:
        return batch.first(part.stop)
    later = weight_batch(num=len(batch.values_BD))
    cond = later.condition
    return WeightBatch(
        values_BD=later.values_BD[part],
        layout=later.layout,
        module=later.module,
        condition=type(cond)(
            instructions=cond.instructions[part],
            samples_BSF=cond.samples_BSF[part],
            labels_BS=cond.labels_BS[part],
        ),
        query=later.query,
        sample_index_B=later.sample_index_B[part],
    )


@pytest.mark.parametrize("way", WAYS)
def test_two_workers_halves_of_a_batch_have_its_loss(way: str) -> None:
    generator, batch = generator_with(**WAYS[way]), weight_batch(num=8)
    whole = nll(generator, batch, noise_for(8))
    halves = [
        nll(generator, rows_of(batch, part), noise_for(4, first=part.start)) for part in (slice(0, 4), slice(4, 8))
    ]
    # Sums in another order.
    torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole, nll(generator, batch, noise_for(8, seed=1)), atol=1e-5)


def test_each_part_is_left_out_for_a_third_of_the_share() -> None:
    num = 20_000
    dropped_B2 = dropped_parts(noise_for(num), 0.3)
    shares = [float((dropped_B2 == torch.tensor(kind)).all(dim=1).float().mean()) for kind in ([1, 0], [0, 1], [1, 1])]
    # Four standard deviations of a share of 0.1 of 20 000 draws are 0.0085.
    assert shares == pytest.approx([0.1] * 3, abs=0.0085)
    halves = [dropped_parts(noise_for(num // 2, first=first), 0.3) for first in (0, num // 2)]
    assert torch.equal(torch.cat(halves), dropped_B2)


def test_a_condition_loses_parts_in_training_alone() -> None:
    cond, num = weight_batch(num=8).condition, 8
    assert with_dropped_parts(cond, noise_for(num), 0.9, training=False) is cond
    assert with_dropped_parts(cond, noise_for(num), 0.0, training=True) is cond
    less = with_dropped_parts(cond, noise_for(num), 0.9, training=True)
    assert less.is_dropped_B2 is not None
    assert torch.equal(less.is_dropped_B2, dropped_parts(noise_for(num), 0.9))
    assert bool(less.is_dropped_B2.any())


@pytest.mark.parametrize("way", ["condition dropout", "independent"])
def test_out_of_training_nothing_is_left_out(way: str) -> None:
    generator, batch = generator_with(**WAYS[way]), weight_batch(num=8)
    stage = PriorStage(generator.prior, generator.tokenizer, generator.normalizers).eval()
    codes_BML = generator.tokens(batch.values_BD, batch.layout)
    table = generator.tokenizer.table(batch.layout)
    log_p_BM = generator.prior.log_likelihood(codes_BML, batch.condition, table, generator.tokenizer.quantiser)
    torch.testing.assert_close(stage(batch, noise_for(8)).loss, -log_p_BM.mean() / 2, rtol=1e-5, atol=1e-6)


def test_all_on_their_own_is_the_likelihood_of_independent_chunks() -> None:
    generator, batch = generator_with(independent_share=1.0), weight_batch(num=8)
    codes_BML = generator.tokens(batch.values_BD, batch.layout)
    log_prob_B = generator.log_prob(
        batch.values_BD, batch.condition, batch.layout, SamplingConfig(chunks="independent")
    )
    loss = nll(generator, batch, noise_for(8))
    torch.testing.assert_close(loss, -log_prob_B.sum() / codes_BML.numel(), rtol=1e-5, atol=1e-6)


def test_tokens_of_a_window_are_the_window_of_the_tokens() -> None:
    """A window's loss, chunk by chunk, from the tokens of the whole network."""
    generator, batch = generator_with(window=2), weight_batch(num=8)
    tokenizer, prior = generator.tokenizer, generator.prior
    for parameter in tokenizer.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    codes_BML = generator.tokens(batch.values_BD, batch.layout)
    positions_MG = tokenizer.positions(batch.layout)
    M = len(positions_MG)
    starts = (noise_for(8).integers(M + 1) - 1).clamp(0, M - 2)
    assert len(set(starts.tolist())) > 2
    total = torch.zeros(())
    for b, start in enumerate(starts.tolist()):
        seen = slice(start, start + 2)
        prefix = prior.prefix(batch.condition, positions_MG.mean(dim=0))[b : b + 1]
        states = prior.states(prefix, positions_MG[seen], tokenizer.quantiser.decode(codes_BML[b : b + 1, seen]))
        total = total + prior.head.log_likelihood(states, codes_BML[b : b + 1, seen], tokenizer.quantiser).sum()
    torch.testing.assert_close(nll(generator, batch, noise_for(8)), -total / (8 * 2 * 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_lowers_its_loss_and_reaches_every_parameter(way: str) -> None:
    generator = generator_with(**WAYS[way])
    stage = PriorStage(generator.prior, generator.tokenizer, generator.normalizers)
    batches = [weight_batch((SMALL, DEEP)[step % 2], 16, seed=step) for step in range(40)]
    losses = train(stage, batches)
    assert sum(losses[-6:]) < 0.97 * sum(losses[:6])
    stage.train()
    stage(batches[0], noise_for(16)).loss.backward()
    assert all(parameter.grad is not None for parameter in stage.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_the_task_loss_stage_judges_what_generate_writes(way: str) -> None:
    generator, batch = generator_with(**WAYS[way]), weight_batch()
    config = generator.config.task_loss
    parts = (
        generator.prior,
        generator.residual_head,
        generator.sample_residual_head,
        generator.tokenizer,
        generator.normalizers,
    )
    stage = IGPGTaskLossStage(config, *parts).eval()
    result = stage(batch, noise_for(8))
    written = generator.generate(
        GenerationRequest(
            condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=config.temperature
        )
    )
    scale_D = generator.normalizers[batch.layout.id][1].scale_D
    distance = ((written.values_BD - batch.values_BD) / scale_D).square().mean()
    # Cached and full attention round differently.
    torch.testing.assert_close(result.metrics["distance"], distance, rtol=1e-4, atol=1e-5)
    stage.train()(batch, noise_for(8)).loss.backward()
    assert all(parameter.grad is not None for parameter in generator.prior.parameters())


def test_a_bundle_with_all_settings_writes_the_same_again(tmp_path) -> None:
    generator = generator_with(**WAYS["all"])
    save_bundle(generator, tmp_path, {})
    again = load_bundle(tmp_path)
    cond = weight_batch().condition
    sampling = SamplingConfig(windows="parallel", guidance=1.5)
    before, after = (
        each.generate(GenerationRequest(condition=cond, layout=layout_of(), noise=noise_for(8), sampling=sampling))  # pyright: ignore[reportCallIssue]
        for each in (generator, again)
    )
    assert torch.equal(before.values_BD, after.values_BD)
    assert before.values_BD.shape == values_of()[:8].shape


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("num_kv_heads=3", "num_kv_heads=3 must divide num_heads=4"),
        ("window=-1", "window=-1"),
        ("condition_dropout=1", r"condition_dropout=1.0 must lie in \[0, 1\)"),
        ("independent_share=2", r"independent_share=2.0 must lie in \[0, 1\]"),
        ("text_encoder=letters", "give one of words, bytes, hf:NAME"),
    ],
)
def test_settings_are_checked(wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(IGPGConfig, None, [f"prior.{wrong}"])


def test_the_task_loss_stage_leaves_parts_out_where_the_prior_does() -> None:
    config = igpg_config()
    config.prior.condition_dropout = 0.3
    config.task_loss.condition_dropout = 0.9
    generator = igpg(config)
    assert generator.reads_parts
    stage = next(stage for stage in generator.all_stages() if isinstance(stage, IGPGTaskLossStage))
    batch = weight_batch(SMALL, 8)
    losses = []
    for is_training in (True, False):
        stage.train(is_training)
        losses.append(float(stage(batch, noise_for(8)).loss.detach()))
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="the prior leaves nothing out"):
        IGPGConfig(task_loss=IGPGTaskLossConfig(condition_dropout=0.5))
