"""The stages of Mc-Di: what they draw, the gradients they give, and that they learn.

Shape legend: B networks, n noised versions, k local targets, D values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.generators import GenerationRequest, OptimizerConfig, Stage
from raywgen.generators.common.targets import normalised_targets
from raywgen.generators.common.task_loss import task_loss
from raywgen.generators.common.writing import Rows
from raywgen.generators.mcdi import McDi, McDiSampling
from raywgen.generators.mcdi.config import DiffusionConfig, Spans
from raywgen.generators.mcdi.local_consistency import noised
from raywgen.generators.mcdi.samplers import Sampler
from raywgen.generators.mcdi.stages import DenoiserStage, Draws, McDiTaskLossStage, consistency_loss, draw, run_sampler
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, stacked_logits
from raywgen.training.engine import LocalEngine
from raywgen.weights import KeyedNoise, WeightBatch
from tests.builders import SMALL, layout_of, noise_for, normalizers
from tests.generators.derivatives import check_derivative
from tests.generators.mcdi.builders import chunk_batch, config, head_batch, mcdi, repeated, support_and_query

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = {
    "consistent": {},
    "naive": {"targets": "naive"},
    "vanilla": {"num_targets": 1},
    "noise": {"parameterisation": "noise", "weighting": "paper"},
}


def denoiser_stage(generator: McDi) -> DenoiserStage:
    return DenoiserStage(generator.config, generator.denoiser, generator.normalizers)


def task_loss_stage(generator: McDi) -> McDiTaskLossStage:
    return McDiTaskLossStage(generator.config, generator.denoiser, generator.normalizers)


def generator_of(kind: str, denoiser: dict[str, Any] | None = None, width: int = 16, **parts: Any) -> McDi:
    settings = config(network={"kind": kind, "width": width}, denoiser=denoiser, **parts)
    return mcdi(settings, table=None if kind == "head" else normalizers(SMALL))


def batch_of(kind: str, num: int = 8) -> WeightBatch:
    return head_batch(num) if kind == "head" else chunk_batch(num)


def learn(stage: Stage, batches: Callable[[int], WeightBatch], num_steps: int, rate: float) -> None:
    stage.setup([batches(step) for step in range(2)], seed=0)
    engine = LocalEngine(stage)
    for step in range(num_steps):
        batch = batches(step)
        engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), rate)
    stage.eval()


def judged(stage: Stage, batch: WeightBatch, name: str) -> float:
    """Without learning, and with noise of its own."""
    with torch.no_grad():
        return float(stage.eval()(batch, KeyedNoise(1, batch.sample_index_B)).metrics[name])


@given(T=st.integers(1, 30), data=st.data())
@settings(max_examples=40)
def test_a_draw_is_a_step_of_the_local_chain_that_ends_at_its_target(T: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(T, 5)))
    chain_config = DiffusionConfig(num_steps=T, num_targets=k)
    chain = chain_config.chain()
    targets_BAD = torch.arange(k).view(1, k, 1).expand(50, k, 2).float()
    (draws,) = draw(targets_BAD, chain_config, noise_for(50, data.draw(st.integers(0, 1000))), num_draws=3)
    assert draws.target_BnD.shape == draws.eps_BnD.shape == (50, 3, 2)
    end_B1 = torch.tensor(chain.ends)[draws.target_BnD[:, :1, 0].long()]
    t_Bn = (draws.time_Bn * T).round().long()
    torch.testing.assert_close(draws.time_Bn, t_Bn / T)
    assert bool((t_Bn >= 0).all() and (t_Bn < end_B1).all())
    torch.testing.assert_close(draws.abar_Bn, chain.abar_T[t_Bn].float())
    torch.testing.assert_close(draws.local_abar_Bn, (chain.abar_T[t_Bn] / chain.abar_T[end_B1]).float())


@pytest.mark.parametrize("spans", ["own", "whole"])
def test_every_target_and_every_step_of_its_span_is_drawn_as_often(spans: Spans) -> None:
    chain_config = DiffusionConfig(num_steps=20, num_targets=3, spans=spans)
    targets_BAD = torch.arange(3).view(1, 3, 1).expand(30_000, 3, 1).float()
    (draws,) = draw(targets_BAD, chain_config, noise_for(30_000), num_draws=1)
    index_B, t_B = draws.target_BnD[:, 0, 0].long(), (draws.time_Bn[:, 0] * 20).round().long()
    ends = chain_config.chain().ends
    for i, end in enumerate(ends):
        begin = ends[i - 1] if spans == "own" and i > 0 else 0
        count_t = t_B[index_B == i].bincount(minlength=20).double()
        # Binomial counts of probability 1 / 3 / (end - begin); five standard deviations.
        expected = 10_000 / (end - begin)
        assert bool(((count_t[begin:end] - expected).abs() < 5 * expected**0.5).all())
        assert int(count_t[:begin].sum() + count_t[end:].sum()) == 0


def test_naive_targets_use_the_whole_chain() -> None:
    chain_config = DiffusionConfig(num_steps=20, num_targets=3, targets="naive")
    targets_BAD = torch.arange(3).view(1, 3, 1).expand(600, 3, 1).float()
    (draws,) = draw(targets_BAD, chain_config, noise_for(600), num_draws=2)
    assert torch.equal(draws.abar_Bn, draws.local_abar_Bn)
    for i in range(3):
        assert float(draws.time_Bn[draws.target_BnD[..., 0] == i].max()) == pytest.approx(0.95)


def test_inner_steps_keep_the_target_and_draw_other_noise() -> None:
    targets_BAD = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0))
    first, second = draw(targets_BAD, DiffusionConfig(), noise_for(8), num_draws=2, num_steps=2)
    assert torch.equal(first.target_BnD, second.target_BnD)
    assert not torch.equal(first.eps_BnD, second.eps_BnD)
    assert not torch.equal(first.time_Bn, second.time_Bn)
    assert not torch.equal(first.eps_BnD[:, 0], first.eps_BnD[:, 1])


def test_a_networks_draws_do_not_depend_on_its_batch() -> None:
    targets_BAD = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0))
    (whole,) = draw(targets_BAD, DiffusionConfig(), noise_for(8), num_draws=2)
    (part,) = draw(targets_BAD[5:], DiffusionConfig(), noise_for(3, first=5), num_draws=2)
    assert all(torch.equal(mine, theirs[5:]) for mine, theirs in zip(part, whole, strict=True))


@pytest.mark.parametrize("variant", ["consistent", "naive", "vanilla"])
def test_the_prediction_that_a_variant_asks_for_has_no_loss(variant: str) -> None:
    diffusion = config(diffusion=VARIANTS[variant]).diffusion
    targets_BAD = torch.randn(40, diffusion.num_targets, 4, generator=torch.Generator().manual_seed(0))
    (draws,) = draw(targets_BAD, diffusion, noise_for(40), num_draws=2)
    abar, local = draws.abar_Bn.unsqueeze(-1), draws.local_abar_Bn.unsqueeze(-1)
    share = local.sqrt() * (1 - abar / local) / (1 - abar)

    def wanted(x_BnD: Tensor, time_Bn: Tensor) -> Tensor:
        assert torch.equal(time_Bn, draws.time_Bn)
        return (draws.target_BnD - share * x_BnD) * (1 - abar) / (1 - local) / (abar / local).sqrt()

    # Squares of float32 rounding.
    assert float(consistency_loss(wanted, draws, diffusion)) < 1e-10
    plain = consistency_loss(lambda _x, _t: draws.target_BnD, draws, diffusion)
    assert (float(plain) < 1e-10) == (variant != "consistent")


@pytest.mark.parametrize(("meta", "variant"), [("reptile", "consistent"), *(("joint", each) for each in VARIANTS)])
def test_both_ways_of_training_learn_heads_from_support_means(meta: str, variant: str) -> None:
    generator = mcdi(config(diffusion=VARIANTS[variant], network={"width": 32}, denoiser={"meta": meta}))
    stage, held = denoiser_stage(generator), head_batch(128, seed=77, num_targets=generator.needs.num_targets)
    stage.setup([held], seed=0)
    before = judged(stage, held, "consistency")
    learn(stage, lambda step: head_batch(16, step, generator.needs.num_targets), num_steps=40, rate=2e-2)
    # Naive local targets contradict each other, which leaves most.
    assert judged(stage, held, "consistency") < 0.25 * before


@pytest.mark.parametrize(("meta", "kind"), [("reptile", "flat"), ("joint", "flat"), ("joint", "chunks")])
def test_both_ways_of_training_learn_whole_networks(meta: str, kind: str) -> None:
    generator = generator_of(kind, {"meta": meta}, width=32)
    stage, held = denoiser_stage(generator), chunk_batch(32, seed=77)
    before = judged(stage, held, "consistency")
    learn(stage, lambda step: chunk_batch(8, step), num_steps=40, rate=2e-2)
    # These weights follow from nothing that is shown; what can be learned is where they lie.
    assert judged(stage, held, "consistency") < 0.8 * before


def plain_loops(stage: DenoiserStage, batch: WeightBatch, noise: KeyedNoise) -> list[dict[str, Tensor]]:
    """phi_i of the paper's inner loop, network by network, by torch's own descent."""
    settings, diffusion = stage.config, stage._config.diffusion
    normalised_BAD = normalised_targets(batch, stage.normalizers)
    targets_BAD = stage.denoiser.encode(normalised_BAD, batch.condition, batch.layout)
    steps = draw(targets_BAD, diffusion, noise, settings.num_draws, settings.inner_steps)
    adapted = []
    for b in range(len(batch.values_BD)):
        own = copy.deepcopy(stage.denoiser)
        descent = torch.optim.SGD(own.parameters(), lr=settings.inner_rate)
        support = (batch.condition.samples_BSF[b : b + 1], batch.condition.labels_BS[b : b + 1], batch.layout)
        for draws in steps:
            of_one = Draws(*(tensor[b : b + 1] for tensor in draws))
            descent.zero_grad()
            consistency_loss(lambda x, t, own=own, support=support: own(x, t, *support), of_one, diffusion).backward()
            descent.step()
        adapted.append({name: parameter.detach() for name, parameter in own.named_parameters()})
    return adapted


@pytest.mark.parametrize("kind", ["head", "flat", "chunks"])
def test_one_step_of_descent_is_the_outer_loop_of_reptile(kind: str) -> None:
    zeta = 0.8
    optimizer = OptimizerConfig(kind="sgd", grad_clip=1e9, weight_decay=0.0, warmup_steps=0)
    outer = {"optimizer": optimizer, "inner_rate": 0.05}
    generator, batch = generator_of(kind, outer), batch_of(kind, 4)
    stage = denoiser_stage(generator)
    start = {name: parameter.detach().clone() for name, parameter in stage.denoiser.named_parameters()}
    adapted = plain_loops(stage, batch, noise_for(4))
    LocalEngine(stage).train_step(batch, noise_for(4), zeta)
    moved = 0.0
    for name, parameter in stage.denoiser.named_parameters():
        mean = torch.stack([own[name] for own in adapted]).mean(dim=0)
        expected = start[name] + zeta * (mean - start[name])
        # Float32: steps of 1e-2 on values near 1 are kept to 1e-5 of the step.
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=2e-6)
        moved = max(moved, float((expected - start[name]).abs().max()))
    assert moved > 1e-3


def test_reptile_tells_the_consistency_before_it_adapts_and_is_judged_by_it() -> None:
    generator = mcdi(config(denoiser={"num_draws": 1, "inner_steps": 1}))
    joint = mcdi(config(denoiser={"num_draws": 1, "meta": "joint"}))
    batch = head_batch(8)
    meta, plain = (denoiser_stage(each).train()(batch, noise_for(8)) for each in (generator, joint))
    torch.testing.assert_close(meta.metrics["consistency"], plain.loss.detach(), rtol=1e-5, atol=0)
    held = denoiser_stage(generator).eval()(batch, noise_for(8))
    assert torch.equal(held.loss, plain.loss)
    assert torch.equal(held.metrics["consistency"], held.loss)


@pytest.mark.parametrize("meta", ["reptile", "joint"])
def test_equal_seeds_give_equal_losses_and_gradients(meta: str) -> None:
    def once(seed: int) -> tuple[Tensor, list[Tensor]]:
        stage = denoiser_stage(mcdi(config(denoiser={"meta": meta}))).train()
        result = stage(head_batch(4), noise_for(4, seed))
        result.loss.backward()
        return result.metrics["consistency"], [p.grad for p in stage.parameters() if p.grad is not None]

    (first, first_grads), (second, second_grads), (other, _) = once(1), once(1), once(2)
    assert torch.equal(first, second)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first_grads, second_grads, strict=True))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reptile_moves_along_the_plain_gradient_where_its_steps_are_small(variant: str) -> None:
    """One step of rate eta is eta times the gradient, whatever the loss."""
    settings = {"inner_steps": 1, "inner_rate": 0.01}
    stages = [
        denoiser_stage(mcdi(config(diffusion=VARIANTS[variant], denoiser=settings | {"meta": meta}))).train()
        for meta in ("reptile", "joint")
    ]
    num_targets = stages[0]._config.diffusion.num_targets
    for stage in stages:
        stage(head_batch(8, num_targets=num_targets), noise_for(8)).loss.backward()
    for (name, mine), theirs in zip(stages[0].named_parameters(), stages[1].parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        # Differences of parameters near 1 in float32: 1e-7 of them.
        torch.testing.assert_close(mine.grad, 0.01 * theirs.grad, rtol=1e-3, atol=3e-7, msg=lambda m, n=name: n + m)


def test_a_batch_without_local_targets_or_with_others_is_refused() -> None:
    stage = denoiser_stage(mcdi())
    with pytest.raises(AssertionError, match="local targets"):
        stage(replace(head_batch(4), targets_BAD=None), noise_for(4))
    with pytest.raises(AssertionError, match="2 targets in the batch, 3 in the config"):
        stage(head_batch(4, num_targets=2), noise_for(4))


def test_beginning_measures_the_support_sets_of_all_batches() -> None:
    generator = mcdi()
    batches = [head_batch(4, seed) for seed in range(3)]
    denoiser_stage(generator).setup(iter(batches), seed=0)
    sets = torch.cat([batch.condition.samples_BSF for batch in batches])
    spread_B = (sets - sets.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(generator.state_dict()["denoiser.net.spread"], spread_B.mean())


def test_targets_are_taken_in_units_of_the_reference() -> None:
    generator, batch = mcdi(), head_batch(4)
    normalizer = generator.normalizers[batch.layout.id][1]
    assert batch.targets_BAD is not None
    found_BAD = normalised_targets(batch, generator.normalizers)
    torch.testing.assert_close(found_BAD[:, 1], (batch.targets_BAD[:, 1] - normalizer.base_D) / normalizer.scale_D)


@pytest.mark.parametrize("kind", ["head", "flat", "chunks"])
def test_the_task_loss_stage_raises_the_accuracy_of_what_is_written(kind: str) -> None:
    short = {"num_steps": 60, "sampling_steps": 2, "consistency": 0.01, "batch_size": 32}
    generator = generator_of(kind, task_loss=short)
    # Whole networks of `chunk_batch` follow from nothing; they learn the task that all share alone.
    one = chunk_batch(1, seed=0)
    drawn = head_batch if kind == "head" else lambda num, seed: repeated(one, num, seed)
    stage, held = task_loss_stage(generator), drawn(64, 77)
    before = judged(stage, held, "accuracy")
    learn(stage, lambda step: drawn(16, step), num_steps=40, rate=1e-2)
    # Chance is a third, or a half.
    assert before < 0.65
    assert judged(stage, held, "accuracy") > 0.85


def test_the_task_loss_loss_is_that_of_the_networks_which_generate_writes() -> None:
    task_loss_settings = {"num_steps": 1, "sampling_steps": 2, "consistency": 0.0}
    generator = mcdi(config(sampling={"num_steps": 2}, task_loss=task_loss_settings))
    batch = head_batch(8)
    result = task_loss_stage(generator)(batch, noise_for(8))
    written = generator.generate(GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise_for(8)))
    samples_BSF = torch.cat([batch.condition.samples_BSF, batch.query.samples_BSF], dim=1)
    labels_BS = torch.cat([batch.condition.labels_BS, batch.query.labels_BS], dim=1)
    logits_BSC = stacked_logits(batch.module, batch.layout.unflatten(written.values_BD), samples_BSF)
    torch.testing.assert_close(result.loss, balanced_cross_entropy(logits_BSC, labels_BS).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.metrics["accuracy"], balanced_accuracy(logits_BSC, labels_BS).mean())


def test_consistency_is_added_to_the_task_loss_with_its_weight() -> None:
    results = [
        task_loss_stage(mcdi(config(task_loss={"num_steps": 1, "consistency": weight})))(head_batch(8), noise_for(8))
        for weight in (0.0, 0.3)
    ]
    added = 0.3 * results[1].metrics["consistency"]
    assert float(added) > 1e-3
    torch.testing.assert_close(results[1].loss, results[0].loss + added, rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0].loss.detach(), results[0].metrics["task_loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["head", "flat", "chunks"])
def test_the_task_loss_loss_reaches_every_parameter_of_the_denoiser(kind: str) -> None:
    generator = generator_of(kind, task_loss={"num_steps": 1, "consistency": 0.0})
    task_loss_stage(generator)(batch_of(kind), noise_for(8)).loss.backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sampler", ["mean", "stochastic", "deterministic"])
@pytest.mark.parametrize("parameterisation", ["weights", "noise"])
def test_the_sampler_is_differentiable_by_finite_differences(sampler: Sampler, parameterisation: str) -> None:
    generator = mcdi(config(diffusion={"parameterisation": parameterisation}))
    denoiser, batch = generator.denoiser, head_batch(4)
    support, _ = support_and_query(4, 3, seed=0)
    start_BD = torch.randn(4, batch.layout.num_values, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        condition_embedding = denoiser.embed_condition(support.samples_BSF, support.labels_BS, batch.layout)
        sampling, noise = McDiSampling(sampler=sampler, num_steps=3), KeyedNoise(0, torch.arange(4))
        rows = Rows(condition_embedding, noise, None, start_BD.shape[1])
        values_BD = run_sampler(denoiser, rows, batch.layout, start_BD, generator.config.diffusion, sampling)
        return task_loss(values_BD, batch)[0].mean()

    loss().backward()
    net: Any = denoiser.net
    for parameter, index in ((net.row.weight, (2, 5)), (net.time.net[0].weight, (3, 1)), (net.direct.weight, (1, 2))):
        # Differences of a loss up to 10 carry 1e-15 / 1e-6 of rounding.
        check_derivative(loss, parameter, index, rounding=1e-8)


def test_a_denoiser_that_has_learned_one_head_writes_it() -> None:
    """End to end: noise, schedule, loss, sampler and units belong together."""
    generator = mcdi(config(network={"width": 32}, denoiser={"meta": "joint"}))
    one = head_batch(1, seed=5)
    learn(denoiser_stage(generator), lambda step: repeated(one, 16, step), num_steps=150, rate=1e-2)
    written = generator.generate(
        GenerationRequest(condition=one.condition, layout=layout_of((6, 3)), noise=noise_for(1))
    )
    normalizer = generator.normalizers[one.layout.id][1]
    wanted, found = normalizer.normalise(one.values_BD), normalizer.normalise(written.values_BD)
    # The last step predicts the end alone; what is left is the net's own error.
    assert float((found - wanted).square().mean()) < 0.02 * float(wanted.square().mean())


def test_noised_versions_keep_signal_and_noise_apart() -> None:
    target_BD, eps_BD = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noised(target_BD, torch.ones(3), eps_BD), target_BD)
    assert torch.equal(noised(target_BD, torch.zeros(3), eps_BD), eps_BD)
