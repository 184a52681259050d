"""Scale tokens in all that uses a tokeniser: writing, reading, training, bundles, layouts never seen.

Shape legend: B networks, M chunks, K values of a chunk.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen.config import ConfigError, load_config
from raywgen.generation import TrainedGenerator, UnknownLayoutWarning
from raywgen.generators import GenerationRequest
from raywgen.generators.bundle import load_bundle, save_bundle
from raywgen.generators.common.task_loss import task_loss
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPG, IGPGConfig, SamplingConfig
from raywgen.generators.igpg.likelihood import token_nll
from raywgen.generators.igpg.stages import IGPGTaskLossStage, PriorStage
from raywgen.generators.igpg.token_sampling import sample_tokens
from raywgen.generators.mcdi.config import McDiConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.weights import Layout, Normalizer, NormalizerTable, layout_normalizer
from raywgen.weights.chunks import chunk_mask, num_position_features, position_features, to_chunks
from tests.builders import (
    SMALL,
    condition,
    igpg,
    igpg_config,
    layout_of,
    network,
    noise_for,
    normalizers,
    same,
    tokenizer_stage,
    train,
    values_of,
    weight_batch,
)

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ("tensor", "filter")
# Its last layer has rows long enough for scales of their own.
WIDE = (6, 20, 2)


def config_of(mode: str, **settings: Any) -> IGPGConfig:
    config = igpg_config()
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, scales=mode, **settings))


def own_starts(*widths: tuple[int, ...]) -> NormalizerTable:
    """References of networks that share no start."""
    layouts = {each: layout_of(each) for each in widths or (SMALL, WIDE)}
    return {layout.id: (layout, Normalizer.measure(layout, values_of(each), None)) for each, layout in layouts.items()}


def shaken(generator: IGPG) -> IGPG:
    """With an encoder, a decoder and a correction that do something."""
    draws = torch.Generator().manual_seed(0)
    parts = (generator.tokenizer.encoder, generator.tokenizer.decoder, generator.residual_head)
    with torch.no_grad():
        for part in parts:
            for parameter in part.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return generator


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_the_layout_is_known_outside_the_tokens(mode: str) -> None:
    generator = shaken(igpg(config_of(mode), own_starts()))
    values_BD, layout = values_of(WIDE)[:4], layout_of(WIDE)
    stranger = IGPG(config_of(mode), own_starts(SMALL), generator.data).eval()
    stranger.load_state_dict(generator.state_dict())
    assert not stranger.knows(layout)
    assert torch.equal(stranger.tokens(values_BD, layout), generator.tokens(values_BD, layout))
    assert torch.equal(stranger.reconstruct(values_BD, layout), generator.reconstruct(values_BD, layout))
    cond = condition(4)
    one, other = (
        each.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(4)))
        for each in (generator, stranger)
    )
    assert torch.equal(one.values_BD, other.values_BD)
    assert one.log_prob_B is not None
    assert other.log_prob_B is not None
    assert torch.equal(one.log_prob_B, other.log_prob_B)
    assert torch.equal(stranger.log_prob(values_BD, cond, layout), generator.log_prob(values_BD, cond, layout))


@pytest.mark.parametrize("mode", MODES)
def test_of_a_shared_start_weights_lie_about_it(mode: str) -> None:
    layout, table = layout_of(), normalizers(SMALL)
    generator, base_D = igpg(config_of(mode), table), table[layout.id][1].base_D
    num_tensors = len(layout.generated)
    moved = IGPG(
        config_of(mode),
        {
            layout.id: (
                layout,
                Normalizer(layout, torch.zeros(num_tensors), torch.full((num_tensors,), 7.0), base_D.flip(0)),
            )
        },
        generator.data,
    ).eval()
    moved.load_state_dict(generator.state_dict())
    values_BD = values_of()[:4]
    shifted_BD = values_BD - base_D + base_D.flip(0)
    # A sum and a difference round, which may move a value between two codes that are equally near.
    codes, others = generator.tokens(values_BD, layout), moved.tokens(shifted_BD, layout)
    assert float((codes == others).float().mean()) > 0.98
    start_BD = generator.normalizer(layout).base_D.expand(1, -1)
    exact_BMK = generator.tokenizer.chunks(start_BD, layout, generator.normalizer(layout), by_code=False)
    assert bool((exact_BMK[:, 0] == 0).all())


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_layout_is_filled_without_a_guess(mode: str, tmp_path: Path) -> None:
    save_bundle(shaken(igpg(config_of(mode), own_starts(SMALL))), tmp_path, {})
    trained = TrainedGenerator(load_bundle(tmp_path))
    module, layout = network(WIDE), layout_of(WIDE)
    normalizer = trained.estimate_normalizer(layout, module)
    assert normalizer is not None
    assert torch.equal(normalizer.base_D, layout_normalizer(layout).base_D)
    cond = condition(1)
    with pytest.warns(UnknownLayoutWarning):
        trained.fill(module, instruction=cond.instructions[0], data=(cond.samples_BSF[0], cond.labels_BS[0]))
    assert bool(layout.flatten(module.state_dict()).isfinite().all())
    related = TrainedGenerator(igpg(config_of(mode), normalizers(SMALL)))
    start_D = layout.flatten(network(WIDE).state_dict())
    normalizer = related.estimate_normalizer(layout, network(WIDE))
    assert normalizer is not None
    assert torch.equal(normalizer.base_D, start_D)
    with pytest.raises(AssertionError, match="no normaliser"):
        related.generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(1)))


@pytest.mark.parametrize("mode", MODES)
def test_a_bundle_writes_what_its_generator_writes(mode: str, tmp_path: Path) -> None:
    generator = shaken(igpg(config_of(mode), normalizers(SMALL, WIDE)))
    save_bundle(generator, tmp_path, {})
    again = load_bundle(tmp_path)
    one, other = (
        each.generate(GenerationRequest(condition=condition(3), layout=layout_of(), noise=noise_for(3))).values_BD
        for each in (generator, again)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_reconstruction_is_close(mode: str) -> None:
    generator, layout = igpg(config_of(mode), own_starts()), layout_of()
    values_BD = values_of()[:8]
    error = (generator.reconstruct(values_BD, layout) - values_BD).square().mean()
    assert float(error) < 0.6 * float(values_BD.square().mean())


@pytest.mark.parametrize("mode", MODES)
def test_codebooks_begin_with_values_of_unit_size(mode: str) -> None:
    torch.manual_seed(0)
    generator = IGPG(config_of(mode), own_starts(), igpg().data)
    tokenizer_stage(generator).setup([weight_batch(SMALL, 16)], 0)
    layout = layout_of()
    chunks_BMK = generator.tokenizer.chunks(values_of()[:16], layout, generator.normalizer(layout), by_code=False)
    first = generator.tokenizer.num_header_chunks(layout)
    assert float(chunks_BMK[:, first:].flatten(1)[:, :38].square().mean()) == pytest.approx(1.0, abs=0.05)
    decoded_BMK = generator.tokenizer.quantiser.decode(generator.tokens(values_of()[:16], layout))
    assert float(decoded_BMK[:, first:-1].square().mean()) > 0.5


def test_every_stage_learns() -> None:
    generator = igpg(
        config_of("filter", quantiser=QuantiserConfig(num_levels=4, num_codes=64)), normalizers(SMALL, WIDE)
    )
    batches = [weight_batch((SMALL, WIDE)[step % 2], 16, seed=step) for step in range(40)]
    stage = tokenizer_stage(generator)
    stage.setup(batches[:2], 0)
    losses = train(stage, batches * 2)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    losses = train(PriorStage(generator.prior, generator.tokenizer, generator.normalizers), batches)
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    task_loss = IGPGTaskLossStage(
        igpg_config().task_loss,
        generator.prior,
        generator.residual_head,
        generator.sample_residual_head,
        generator.tokenizer,
        generator.normalizers,
    )
    losses = train(task_loss, batches, learning_rate=5e-3)
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


@pytest.mark.parametrize("mode", MODES)
def test_the_tasks_gradient_reaches_scales_and_no_padding(mode: str) -> None:
    generator, batch = igpg(config_of(mode), own_starts()), weight_batch(num=3)
    tokenizer, normalizer = generator.tokenizer, generator.normalizer(batch.layout)
    chunks_BMK = tokenizer.chunks(batch.values_BD, batch.layout, normalizer).double().requires_grad_()
    batch = dataclasses.replace(
        batch,
        module=copy.deepcopy(batch.module).double(),
        query=dataclasses.replace(batch.query, samples_BSF=batch.query.samples_BSF.double()),
    )
    double = Layout(tuple(dataclasses.replace(spec, dtype="float64") for spec in batch.layout.tensors))
    batch = dataclasses.replace(batch, layout=double)

    def loss(each_BMK: Tensor) -> Tensor:
        return task_loss(tokenizer.values(each_BMK, double, normalizer), batch)[0].sum()

    loss(chunks_BMK).backward()
    assert chunks_BMK.grad is not None
    is_real_MK, first, step = tokenizer.mask(double) > 0, tokenizer.num_header_chunks(double), 1e-5
    assert bool((chunks_BMK.grad[:, ~is_real_MK] == 0).all())
    # The last layer's mean shift moves both logits alike, which no loss sees; it stands at the end of the means.
    is_felt_MK = is_real_MK[:first].clone()
    is_felt_MK[0, 1] = False
    assert bool((chunks_BMK.grad[:, :first][:, is_felt_MK] != 0).all())
    for position in [(0, 0, 1), (1, first - 1, 0), (2, first - 1, 2)]:
        shift_BMK = torch.zeros_like(chunks_BMK)
        shift_BMK[position] = step
        with torch.no_grad():
            numeric = float(loss(chunks_BMK + shift_BMK) - loss(chunks_BMK - shift_BMK)) / (2 * step)
        assert float(chunks_BMK.grad[position]) == pytest.approx(numeric, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_the_task_loss_stage_trains_what_writes_scales(mode: str) -> None:
    generator, batch = shaken(igpg(config_of(mode), own_starts())), weight_batch()
    stage = IGPGTaskLossStage(
        dataclasses.replace(igpg_config().task_loss, nll_weight=0.0, l2_anchor_weight=0.0),
        generator.prior,
        generator.residual_head,
        generator.sample_residual_head,
        generator.tokenizer,
        generator.normalizers,
    )
    # Nothing but the flags of leading chunks feeds these columns.
    stage(batch, noise_for(8)).loss.backward()
    gradient = generator.residual_head.position.weight.grad
    assert gradient is not None
    assert float(gradient[:, -2:].abs().sum()) > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", [{}, {"windows": "parallel"}, {"chunks": "independent"}])
def test_windows_hold_header_chunks_as_any_others(mode: str, sampling: dict[str, Any]) -> None:
    config = config_of(mode)
    config.prior.window = 3
    generator, layout, cond = igpg(config, normalizers(SMALL, WIDE)), layout_of(WIDE), condition(4)
    asked = SamplingConfig(decoding="tokens", **sampling)
    table = generator.tokenizer.table(layout)
    sample = sample_tokens(generator.prior, cond, table, generator.tokenizer.quantiser, noise_for(4), 1.0, asked)
    assert sample.codes_BML.shape[1] == len(generator.tokenizer.mask(layout))
    written = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(4), sampling=asked))
    read_BM = generator.prior.log_likelihood(sample.codes_BML, cond, table, generator.tokenizer.quantiser, asked)
    assert written.log_prob_B is not None
    torch.testing.assert_close(written.log_prob_B, read_BM.sum(dim=1), rtol=1e-4, atol=1e-3)
    nll = token_nll(generator.prior, generator.tokenizer, weight_batch(WIDE), generator.normalizers, noise_for(8))
    assert bool(nll.isfinite())


def test_scales_of_the_corpus_are_as_they_were() -> None:
    generator, layout = igpg(), layout_of()
    tokenizer, normalizer = generator.tokenizer, generator.normalizer(layout)
    normalised_BMK = to_chunks(normalizer.normalise(values_of()), 8)
    assert torch.equal(tokenizer.chunks(values_of(), layout, normalizer), normalised_BMK)
    assert tokenizer.positions(layout) is position_features(layout, 8)
    assert torch.equal(tokenizer.mask(layout), chunk_mask(layout, 8))
    assert tokenizer.num_header_chunks(layout) == 0
    assert tokenizer.num_position_features == num_position_features()
    assert generator.tokens(values_of()[:1], layout).shape == (1, 5, 2)


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match="normalizer, tensor, filter"):
        load_config(TokenizerConfig, None, ["scales=row"])
    with pytest.raises(ConfigError, match=r"unknown key 'tokenizer\.scales'"):
        load_config(McDiConfig, None, ["tokenizer.scales=filter"])


def test_evaluation_of_the_stage_is_of_values_alone() -> None:
    generator, batch = igpg(config_of("tensor")), weight_batch()
    tokenizer, layout = generator.tokenizer, batch.layout
    metrics = tokenizer_stage(generator).eval()(batch, noise_for(8)).metrics
    chunks_BMK = tokenizer.chunks(batch.values_BD, layout, generator.normalizer(layout))
    decoded_BMK = tokenizer.decode(generator.tokens(batch.values_BD, layout), tokenizer.positions(layout))
    first = tokenizer.num_header_chunks(layout)
    of_values = [each_BMK[:, first:].flatten(1)[:, :38] for each_BMK in (chunks_BMK, decoded_BMK)]
    noise = (of_values[0] - of_values[1]).square().mean()
    assert float(metrics["snr_db"]) == pytest.approx(
        float(10 * torch.log10(of_values[0].square().mean() / noise)), abs=1e-3
    )


def test_moving_codebooks_keep_the_loop_closed() -> None:
    generator, batch = (
        igpg(config_of("filter", quantiser=QuantiserConfig(num_levels=1, num_codes=8))),
        weight_batch(num=16),
    )
    stage = tokenizer_stage(generator)
    layout, normalizer = batch.layout, generator.normalizer(batch.layout)
    before_BMK = generator.tokenizer.chunks(batch.values_BD, layout, normalizer)
    stage.train()(batch, noise_for(16))
    stage.after_step(same)
    after_BMK = generator.tokenizer.chunks(batch.values_BD, layout, normalizer)
    first = generator.tokenizer.num_header_chunks(layout)
    assert torch.equal(before_BMK[:, 0], after_BMK[:, 0])
    assert not torch.equal(before_BMK[:, first:], after_BMK[:, first:])
