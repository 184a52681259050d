"""Training stages: right gradients, falling losses, frozen parts that stay frozen."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from raywgen.config import load_config
from raywgen.generators import GenerationRequest
from raywgen.generators.common.task_loss import task_loss
from raywgen.generators.igpg.config import IGPGTaskLossConfig, SamplingConfig
from raywgen.generators.igpg.generator import IGPG
from raywgen.generators.igpg.likelihood import token_nll
from raywgen.generators.igpg.stages import IGPGTaskLossStage, PriorStage, deviation, diversity_loss
from raywgen.generators.igpg.token_sampling import TokenSample, sample_tokens
from raywgen.nn.text_encoders import WordEncoder
from raywgen.tasks import balanced_cross_entropy, stacked_logits
from raywgen.weights import Layout, Normalizer, WeightBatch
from tests.builders import (
    DATA,
    DEEP,
    SMALL,
    igpg,
    igpg_config,
    layout_of,
    noise_for,
    tokenizer_stage,
    train,
    values_of,
    weight_batch,
)


def batches(num_steps: int, num: int = 16) -> list[WeightBatch]:
    """Both layouts in turn, new samples in every step."""
    return [weight_batch((SMALL, DEEP)[step % 2], num, seed=step) for step in range(num_steps)]


def task_loss_stage(generator: IGPG, **settings: Any) -> IGPGTaskLossStage:
    config = IGPGTaskLossConfig(**settings)
    parts = (
        generator.prior,
        generator.residual_head,
        generator.sample_residual_head,
        generator.tokenizer,
        generator.normalizers,
    )
    return IGPGTaskLossStage(config, *parts)


def test_tokenizer_stage_lowers_its_loss() -> None:
    generator = igpg()
    stage = tokenizer_stage(generator)
    stage.setup(batches(2), seed=0)
    # At first the encoder runs ahead of the codebooks' moving averages, and the loss rises.
    losses = train(stage, batches(600))
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_prior_stage_lowers_its_loss_and_leaves_the_tokenizer_alone() -> None:
    generator = igpg()
    before = copy.deepcopy(generator.tokenizer.state_dict())
    losses = train(PriorStage(generator.prior, generator.tokenizer, generator.normalizers), batches(40))
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.tokenizer.state_dict().items())


def test_task_loss_stage_lowers_its_loss_and_leaves_the_tokenizer_alone() -> None:
    generator = igpg()
    before = copy.deepcopy(generator.tokenizer.state_dict())
    prior_before = copy.deepcopy(generator.prior.state_dict())
    losses = train(task_loss_stage(generator), batches(60), learning_rate=5e-3)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.tokenizer.state_dict().items())
    assert any(not torch.equal(tensor, prior_before[name]) for name, tensor in generator.prior.state_dict().items())


def test_task_loss_stage_trains_prior_and_residual_head_only() -> None:
    generator = igpg()
    trained = {id(parameter) for parameter in task_loss_stage(generator).parameters()}
    wanted = [*generator.prior.parameters(), *generator.residual_head.parameters()]
    assert trained == {id(parameter) for parameter in wanted}


def varied() -> IGPG:
    """An untrained generator whose variation already says something."""
    config = igpg_config()
    generator = igpg(replace(config, task_loss=replace(config.task_loss, diversity_weight=0.3)))
    assert generator.sample_residual_head is not None
    final = generator.sample_residual_head.out[-1]
    assert isinstance(final, nn.Linear)
    torch.nn.init.normal_(final.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return generator


def test_the_sample_residual_head_is_there_with_a_diversity_weight_alone() -> None:
    assert igpg().sample_residual_head is None
    config = igpg_config()
    assert (
        igpg(
            replace(config, task_loss=replace(config.task_loss, diversity_weight=0.3, num_steps=0))
        ).sample_residual_head
        is None
    )
    generator = varied()
    trained = {id(parameter) for parameter in task_loss_stage(generator, diversity_weight=0.3).parameters()}
    assert generator.sample_residual_head is not None
    assert {id(parameter) for parameter in generator.sample_residual_head.parameters()} < trained


def test_the_sample_residual_head_adds_what_was_drawn_beyond_the_expected_code() -> None:
    generator, batch = varied(), weight_batch()
    assert generator.sample_residual_head is not None
    table = generator.tokenizer.table(batch.layout)
    with torch.no_grad():
        drawing = (batch.condition, table, generator.tokenizer.quantiser, noise_for(8), 0.5)
        sample = sample_tokens(generator.prior, *drawing)
        assert sample.expected_BMK is not None
        beyond_BMK = generator.tokenizer.quantiser.decode(sample.codes_BML) - sample.expected_BMK
        added_BMK = generator.sample_residual_head(beyond_BMK, table.positions_MG)
        written = generator.generate(
            GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=0.5)
        ).values_BD
        generator.sample_residual_head = None
        without = generator.generate(
            GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=0.5)
        ).values_BD
    normalizer = generator.normalizers[batch.layout.id][1]
    added_BD = added_BMK.flatten(1)[:, : batch.layout.num_values]
    torch.testing.assert_close(
        normalizer.normalise(written) - normalizer.normalise(without), added_BD, atol=1e-5, rtol=0
    )
    assert float(added_BD.std(dim=0).mean()) > 0.01


def test_prior_loss_of_untrained_uniform_head_is_log_of_the_codes() -> None:
    generator = igpg()
    head = generator.prior.head
    with torch.no_grad():
        for parameter in (head.query, head.free, head.bias):
            parameter.zero_()
    stage = PriorStage(generator.prior, generator.tokenizer, generator.normalizers)
    loss = stage(weight_batch(), noise_for(8)).loss
    torch.testing.assert_close(loss, torch.tensor(8.0).log(), rtol=1e-5, atol=0)


def test_task_loss_is_that_of_the_networks_one_by_one() -> None:
    batch = weight_batch(num=3)
    loss_B, accuracy_B = task_loss(batch.values_BD, batch)
    for b in range(3):
        module = copy.deepcopy(batch.module)
        module.load_state_dict(batch.layout.unflatten(values_of()[b]), strict=True)
        logits_SC = module(batch.query.samples_BSF[b])
        alone = balanced_cross_entropy(logits_SC.unsqueeze(0), batch.query.labels_BS[b])
        torch.testing.assert_close(loss_B[b : b + 1], alone, rtol=1e-5, atol=1e-6)
        recalls = [
            (logits_SC.argmax(-1) == label)[batch.query.labels_BS[b] == label].float().mean() for label in (0, 1)
        ]
        torch.testing.assert_close(accuracy_B[b], torch.stack(recalls).mean())


@pytest.mark.parametrize("is_varied", [False, True])
def test_task_loss_loss_is_that_of_the_networks_which_generate_writes(is_varied: bool) -> None:
    generator, batch = varied() if is_varied else igpg(), weight_batch()
    stage = task_loss_stage(generator, nll_weight=0.0, l2_anchor_weight=0.0, temperature=0.5).eval()
    loss = stage(batch, noise_for(8)).loss
    written = generator.generate(
        GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=0.5)
    )
    expected = task_loss(written.values_BD, batch)[0].mean()
    # Cached and full attention round differently.
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_likelihood_is_added_with_its_weight() -> None:
    generator, batch = igpg(), weight_batch()
    plain = task_loss_stage(generator, nll_weight=0.0).eval()(batch, noise_for(8))
    both = task_loss_stage(generator, nll_weight=0.3).eval()(batch, noise_for(8))
    torch.testing.assert_close(both.loss, plain.loss + 0.3 * both.metrics["nll"], rtol=1e-5, atol=1e-6)
    assert "nll" not in plain.metrics
    nll = token_nll(generator.prior, generator.tokenizer, batch.first(2), generator.normalizers, noise_for(2))
    torch.testing.assert_close(both.metrics["nll"], nll, rtol=1e-5, atol=1e-6)


def test_the_likelihood_draws_its_windows_from_noise_that_the_rollout_does_not_use() -> None:
    config = igpg_config()
    config.prior.window = 2
    generator, batch = igpg(config), weight_batch()
    nll = task_loss_stage(generator, nll_weight=0.3).eval()(batch, noise_for(8)).metrics["nll"]
    parts = (generator.prior, generator.tokenizer, batch.first(2), generator.normalizers)
    own = noise_for(2).split(torch.ones(1, dtype=torch.int64), 1)
    torch.testing.assert_close(nll, token_nll(*parts, own).detach(), rtol=1e-5, atol=1e-6)
    assert float((nll - token_nll(*parts, noise_for(2)).detach()).abs()) > 1e-4


def test_anchor_is_the_distance_to_the_corpus_in_units_of_its_scale() -> None:
    generator, batch = igpg(), weight_batch()
    plain = task_loss_stage(generator, l2_anchor_weight=0.0).eval()(batch, noise_for(8))
    both = task_loss_stage(generator, l2_anchor_weight=0.3).eval()(batch, noise_for(8))
    written = generator.generate(
        GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=0.5)
    )
    scale_D = generator.normalizers[batch.layout.id][1].scale_D
    distance = ((written.values_BD - batch.values_BD) / scale_D).square().mean()
    # Cached and full attention round differently.
    torch.testing.assert_close(both.metrics["distance"], distance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.loss, plain.loss + 0.3 * both.metrics["distance"], rtol=1e-5, atol=1e-6)


def test_spread_is_how_far_each_deviation_is_from_the_corpus() -> None:
    unit = 3.0
    direction_B = torch.tensor([1.0, -1, 1, -1, 1, -1])
    direction_B = direction_B / direction_B.std()
    written_BD = direction_B.unsqueeze(1) * unit * torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0]) + 7
    # The variance added under the root moves a deviation of zero by less than 0.01, and others by far less.
    assert float(diversity_loss(written_BD, torch.tensor(unit))) == pytest.approx((1 + 0.5 + 1) / 5, abs=0.01)


def test_the_deviation_of_networks_is_that_of_all_batches_together() -> None:
    """Also where each batch holds a network twice, as two states of one trajectory may nearly be."""
    generator, batch = igpg(), weight_batch()
    normalizer = generator.normalizers[batch.layout.id][1]
    twice = [replace(batch, values_BD=batch.values_BD[[n] * 8]).first(2) for n in range(8)]
    expected = normalizer.normalise(batch.values_BD).double().var(dim=0, correction=0).mean().sqrt()
    # Of 16 rows in place of 8.
    found = deviation(twice, generator.normalizers) * (15 / 16) ** 0.5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert deviation([batch.first(1)], generator.normalizers) == 1, "a single network has none"


def test_setup_measures_the_deviation_and_a_resumed_stage_has_it() -> None:
    generator, batch = igpg(), weight_batch()
    stage = task_loss_stage(generator, diversity_weight=0.3)
    stage.setup([batch], 0)
    assert float(stage.corpus_deviation) == pytest.approx(float(deviation([batch], generator.normalizers)))
    resumed = task_loss_stage(generator, diversity_weight=0.3)
    resumed.set_state(stage.state(lambda tensor: tensor), lambda step: batch)
    assert resumed.corpus_deviation == stage.corpus_deviation != 1
    plain = task_loss_stage(generator)
    plain.setup([batch], 0)
    assert plain.corpus_deviation == 1
    assert plain.state(lambda tensor: tensor) == {}


def test_spread_is_added_with_its_weight_and_the_confidence_beyond_chance() -> None:
    generator, batch = igpg(), weight_batch()
    written = generator.generate(
        GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=0.5)
    )
    # Networks that write at chance get no spread, so these are asked for what they answer anyway.
    states = batch.layout.unflatten(written.values_BD)
    answers_BS = stacked_logits(batch.module, states, batch.query.samples_BSF).argmax(dim=-1)
    batch = replace(batch, query=replace(batch.query, labels_BS=answers_BS))
    plain = task_loss_stage(generator).eval()(batch, noise_for(8))
    both = task_loss_stage(generator, diversity_weight=0.3).eval()(batch, noise_for(8))
    confidence = 2 * task_loss(written.values_BD, batch)[0].neg().exp().mean() - 1
    assert float(confidence) > 0.02
    # Cached and full attention round differently.
    torch.testing.assert_close(
        both.loss, plain.loss + 0.3 * confidence * both.metrics["diversity_loss"], rtol=1e-4, atol=1e-5
    )
    assert "diversity_loss" not in plain.metrics
    wrong = replace(batch, query=replace(batch.query, labels_BS=1 - answers_BS))
    without, with_spread = (
        task_loss_stage(generator, diversity_weight=weight).eval()(wrong, noise_for(8)) for weight in (0.0, 0.3)
    )
    torch.testing.assert_close(with_spread.loss, without.loss)
    # One network has no variance.
    alone = task_loss_stage(generator, diversity_weight=0.3).eval()(batch.first(1), noise_for(1))
    assert float(alone.metrics["diversity_loss"]) == 0


def test_confidence_weighs_the_spread_and_is_not_trained_itself() -> None:
    """However sure the networks are, the spread pulls in one direction: that of the spread alone."""
    generator, batch = igpg(), weight_batch()
    written = generator.generate(
        GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=0.5)
    )
    states = batch.layout.unflatten(written.values_BD)
    pulls = []
    for size in (1.0, 3.0):
        samples_BSF = size * batch.query.samples_BSF
        answers_BS = stacked_logits(batch.module, states, samples_BSF).argmax(dim=-1)
        asked = replace(batch, query=replace(batch.query, samples_BSF=samples_BSF, labels_BS=answers_BS))
        gradients = []
        for weight in (30.0, 0.0):
            generator.zero_grad()
            task_loss_stage(generator, diversity_weight=weight, l2_anchor_weight=0.0, nll_weight=0.0).eval()(
                asked, noise_for(8)
            ).loss.backward()
            parts = [p.grad.flatten() for p in generator.residual_head.parameters() if p.grad is not None]
            gradients.append(torch.cat(parts))
        pulls.append(gradients[0] - gradients[1])
    assert float(torch.cosine_similarity(*pulls, dim=0)) == pytest.approx(1.0, abs=1e-3)
    assert float(pulls[1].norm() / pulls[0].norm()) > 1.1


def test_task_loss_stage_writes_parallel_windows_as_generation_does() -> None:
    config = igpg_config()
    config.prior.window = 2
    generator, batch = igpg(config), weight_batch()
    losses = {}
    for windows in ("parallel", "sequential"):
        stage = task_loss_stage(
            generator, nll_weight=0.0, l2_anchor_weight=0.0, temperature=0.5, windows=windows
        ).eval()
        losses[windows] = stage(batch, noise_for(8)).loss.detach()
        sampling = SamplingConfig(windows=windows)
        request = GenerationRequest(
            condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=0.5, sampling=sampling
        )
        written = generator.generate(request)
        # Cached and full attention round differently.
        expected = task_loss(written.values_BD, batch)[0].mean()
        torch.testing.assert_close(losses[windows], expected, rtol=1e-4, atol=1e-5)
    assert float((losses["parallel"] - losses["sequential"]).abs()) > 1e-4


def normalised_batch() -> tuple[IGPG, WeightBatch]:
    """A generator of networks with batch normalisation, and a batch of these."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    layout = Layout.from_state_dict(module.state_dict())
    start_D = layout.flatten(module.state_dict())
    values_BD = start_D + 0.2 * torch.rand(8, layout.num_values)
    normalizers = {layout.id: (layout, Normalizer.measure(layout, values_BD, None))}
    generator = IGPG(igpg_config(), normalizers, DATA).eval()
    generator.tokenizer.quantiser.initialise(torch.randn(64, 8), 5, torch.Generator().manual_seed(0))
    return generator, replace(weight_batch(), values_BD=values_BD, layout=layout, module=module)


@pytest.mark.parametrize("statistics", ["stored", "batch"])
def test_task_loss_stage_takes_the_configured_statistics(statistics: str) -> None:
    generator, batch = normalised_batch()
    stage = task_loss_stage(
        generator, nll_weight=0.0, l2_anchor_weight=0.0, temperature=0.5, statistics=statistics
    ).eval()
    loss = stage(batch, noise_for(8)).loss
    written = generator.generate(
        GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise_for(8), temperature=0.5)
    )
    logits = []
    for values_D, x_SF in zip(written.values_BD, batch.query.samples_BSF, strict=True):
        module = copy.deepcopy(batch.module).train(statistics == "batch")
        module.load_state_dict(batch.layout.unflatten(values_D, counters=module.state_dict()))
        logits.append(module(x_SF))
    expected = balanced_cross_entropy(torch.stack(logits), batch.query.labels_BS).mean()
    # Cached and full attention round differently.
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("statistics", ["stored", "batch"])
def test_task_loss_stage_teaches_networks_with_batch_normalisation(statistics: str) -> None:
    generator, batch = normalised_batch()
    losses = train(task_loss_stage(generator, statistics=statistics), [batch] * 40, learning_rate=5e-3)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("wrong", ["windows", "statistics"])
def test_unknown_ways_of_the_task_loss_stage_are_named(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong}=none: give one of"):
        load_config(IGPGTaskLossConfig, None, [f"{wrong}=none"])


@pytest.mark.usefixtures("float64")
def test_task_loss_gradient_by_finite_differences_in_float64() -> None:
    generator, batch = igpg(), weight_batch(num=3)
    with torch.no_grad():
        final = generator.residual_head.out[-1]
        assert isinstance(final, torch.nn.Linear)
        final.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    # At temperature 0 the prefix is the same on both sides of a small step, unless two codes tie.
    stage = task_loss_stage(generator, nll_weight=0.0, temperature=0.0)
    stage(batch, noise_for(3)).loss.backward()
    step = 1e-6
    text = generator.prior.condition.text
    assert isinstance(text, WordEncoder)
    checked = [
        (generator.prior.head.bias, (0, 1)),
        (generator.prior.head.query, (1, 2, 3)),
        (generator.prior.head.chosen.weight, (4, 1)),
        (generator.prior.previous.weight, (3, 2)),
        (generator.prior.trunk.norm.weight, (5,)),
        (generator.prior.condition.samples.pixel.weight, (2, 1)),
        (text.head[0].bias, (1,)),
        (final.weight, (2, 5)),
    ]
    assert batch.condition.samples_BSF.dtype == torch.float64
    for parameter, index in checked:
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.grad is not None
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
                losses.append(float(stage(batch, noise_for(3)).loss))
                parameter[index] -= sign * step
        numeric = (losses[0] - losses[1]) / (2 * step)
        # Differences of a loss near 1 carry 1e-16 / 1e-6 of rounding.
        assert float(parameter.grad[index]) == pytest.approx(numeric, rel=1e-5, abs=2e-9)
        assert numeric != 0


def test_samples_of_the_task_loss_stage_have_no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    config = igpg().config
    config.prior.dropout = 0.5
    generator = igpg(config)
    stage = task_loss_stage(generator, nll_weight=0.0).train()
    seen = []

    def watched(*args: Any) -> TokenSample:
        seen.append((generator.prior.training, sample_tokens(*args)))
        return seen[-1][1]

    monkeypatch.setattr("raywgen.generators.igpg.stages.sample_tokens", watched)
    for _ in range(2):
        stage(weight_batch(), noise_for(8))
    assert [training for training, _ in seen] == [False, False]
    assert torch.equal(seen[0][1].codes_BML, seen[1][1].codes_BML)
    assert generator.prior.training


@pytest.mark.parametrize(
    ("tokenizer", "prior", "whole"),
    [
        ({}, {}, (False, False)),
        ({"window": 0}, {"window": 0}, (True, True)),
        ({"scales": "filter"}, {}, (False, False)),
        ({"scales": "tensor"}, {"window": 0}, (False, True)),
        ({"output_loss_weight": 1.0}, {}, (True, False)),
    ],
)
def test_a_stage_says_that_it_needs_whole_networks_exactly_where_it_draws_no_windows(
    tokenizer: dict[str, Any], prior: dict[str, Any], whole: tuple[bool, bool]
) -> None:
    config = igpg_config()
    config.tokenizer = replace(config.tokenizer, **{"window": 3} | tokenizer)
    config.prior = replace(config.prior, **{"window": 3} | prior)
    layout = layout_of()
    for stage, needs_whole in zip(igpg(config).all_stages(), (*whole, True), strict=True):
        assert stage.needs.whole_networks == needs_whole, stage.name
        assert (stage.windows(layout, noise_for(2)) is None) == needs_whole, stage.name
