"""The VQ-VAE and its losses.

Shape legend: B networks, M chunks, K values of a chunk, L levels, D values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from raywgen.generators import GenerationRequest
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.common.tokenizer.stage import _VectorSample, masked_reconstruction_loss
from raywgen.generators.common.tokenizer.windows import random_windows
from raywgen.generators.igpg import IGPG, IGPGConfig, PriorConfig
from raywgen.nn.coders import PerceptronCoder
from raywgen.nn.quantisers import QuantiserConfig, ResidualQuantiser, build_quantiser
from raywgen.training.engine import LocalEngine
from raywgen.weights.chunks import chunk_mask
from tests.builders import (
    DATA,
    DEEP,
    SMALL,
    igpg,
    igpg_config,
    layout_of,
    noise_for,
    normalizers,
    same,
    tokenizer_stage,
    train,
    values_of,
    weight_batch,
)


def test_masked_reconstruction_by_hand_with_padding() -> None:
    chunks_BMK = torch.tensor([[[1.0, 2.0], [3.0, 9.0]], [[0.0, 0.0], [1.0, -9.0]]])
    decoded_BMK = torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[0.0, 3.0], [1.0, 0.0]]])
    mask_MK = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    # Squares 1, 0, 4 and 0, 9, 0 over six real values; the two padded ones (81 each) count nowhere.
    assert float(masked_reconstruction_loss(chunks_BMK, decoded_BMK, mask_MK)) == pytest.approx(14 / 6)


def test_what_is_decoded_into_padding_changes_nothing() -> None:
    mask_MK = chunk_mask(layout_of(), 8)
    assert float(mask_MK.sum()) == 38
    assert mask_MK.shape == (5, 8)
    chunks_BMK, decoded_BMK = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = ((chunks_BMK - decoded_BMK).flatten(1)[:, :38].double() ** 2).mean()
    garbage_BMK = torch.where(mask_MK > 0, decoded_BMK, torch.tensor(1e6))
    loss = masked_reconstruction_loss(chunks_BMK, garbage_BMK, mask_MK)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_untrained_tokenizer_is_plain_residual_kmeans() -> None:
    tokenizer = igpg().tokenizer
    layout = layout_of()
    chunks_BMK = tokenizer.chunks(values_of()[:4], layout, normalizers()[layout.id][1])
    positions_MG = tokenizer.positions(layout)
    assert torch.equal(tokenizer.latents(chunks_BMK, positions_MG), chunks_BMK)
    codes_BML = tokenizer.encode(chunks_BMK, positions_MG, tokenizer.mask(layout))
    assert codes_BML.shape == (4, 5, 2)
    mask_NK = tokenizer.mask(layout).repeat(4, 1)
    assert torch.equal(codes_BML.flatten(0, 1), tokenizer.quantiser.encode(chunks_BMK.flatten(0, 1), mask_NK))
    assert torch.equal(tokenizer.decode(codes_BML, positions_MG), tokenizer.quantiser.decode(codes_BML))


def test_chunks_and_values_are_inverse() -> None:
    tokenizer, layout = igpg().tokenizer, layout_of()
    normalizer = normalizers()[layout.id][1]
    values_BD = values_of()[:3]
    back_BD = tokenizer.values(tokenizer.chunks(values_BD, layout, normalizer), layout, normalizer)
    torch.testing.assert_close(back_BD, values_BD, rtol=1e-6, atol=1e-6)  # one division and one product


def test_stage_loss_is_reconstruction_plus_weighted_commitment() -> None:
    generator = igpg()
    stage = tokenizer_stage(generator).eval()
    with torch.no_grad():
        for part in (generator.tokenizer.encoder, generator.tokenizer.decoder):
            for parameter in part.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    batch = weight_batch()
    result = stage(batch, noise_for(8))
    tokenizer, layout = generator.tokenizer, batch.layout
    normalised_BD = generator.normalizer(layout).normalise(batch.values_BD)
    decoded_BD = generator.normalizer(layout).normalise(generator.reconstruct(batch.values_BD, layout))
    reconstruction = (normalised_BD - decoded_BD).square().mean()
    chunks_BMK, positions_MG = (
        tokenizer.chunks(batch.values_BD, layout, generator.normalizer(layout)),
        tokenizer.positions(layout),
    )
    latents_BMK = tokenizer.latents(chunks_BMK, positions_MG)
    quantised_BMK = tokenizer.quantiser.decode(generator.tokens(batch.values_BD, layout))
    mask_MK = chunk_mask(layout, 8)
    commitment = ((latents_BMK - quantised_BMK).square() * mask_MK).sum() / (mask_MK.sum() * 8)
    expected = reconstruction + stage.config.commitment * commitment
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-6)
    assert float(result.metrics["snr_db"]) == pytest.approx(
        float(10 * torch.log10(normalised_BD.square().mean() / reconstruction)), abs=1e-3
    )


def test_encoder_gets_the_decoders_gradient_straight_through() -> None:
    generator = igpg()
    stage = tokenizer_stage(generator).train()
    stage(weight_batch(), noise_for(8)).metrics["reconstruction"]
    result = stage(weight_batch(), noise_for(8))
    result.loss.backward()
    encoder = generator.tokenizer.encoder
    assert isinstance(encoder, PerceptronCoder)
    final = encoder.out[-1]
    assert isinstance(final, torch.nn.Linear)
    assert final.bias.grad is not None
    assert float(final.bias.grad.abs().sum()) > 0


def counts(generator: IGPG) -> float:
    assert isinstance(generator.tokenizer.quantiser, ResidualQuantiser)
    return float(generator.tokenizer.quantiser.new_counts_LV.sum())


def test_codebooks_move_in_training_and_stay_in_evaluation() -> None:
    generator = igpg()
    stage = tokenizer_stage(generator)
    before = generator.tokenizer.quantiser.codebooks_LVK.clone()
    stage.eval()(weight_batch(), noise_for(8))
    assert counts(generator) == 0
    stage.train()(weight_batch(), noise_for(8))
    assert counts(generator) == 2 * 8 * 5
    stage.after_step(same)
    assert not torch.equal(generator.tokenizer.quantiser.codebooks_LVK, before)


KINDS = {
    "residual": QuantiserConfig(num_levels=3, num_codes=16, beam=4, revive_below=0.05),
    "gumbel": QuantiserConfig(kind="gumbel", num_levels=4, num_codes=32),
    "finite_scalar": QuantiserConfig(kind="finite_scalar", num_levels=4, num_codes=64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisers_code_vectors_add_up_to_what_it_decodes(kind: str) -> None:
    config = KINDS[kind]
    quantiser = build_quantiser(config, 8)
    quantiser.initialise(torch.randn(500, 8), 5, torch.Generator().manual_seed(0))
    codes_NL = quantiser.encode(torch.randn(20, 8))
    assert codes_NL.shape == (20, config.num_levels)
    assert quantiser.codebooks_LVK.shape == (config.num_levels, config.num_codes, 8)
    chosen = quantiser.codebooks_LVK[torch.arange(config.num_levels), codes_NL].sum(dim=1)
    torch.testing.assert_close(chosen, quantiser.decode(codes_NL))


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantiser_trains_and_writes_networks(kind: str) -> None:
    tokenizer = TokenizerConfig(chunk_length=8, quantiser=KINDS[kind], width=16, num_steps=30)
    config = IGPGConfig(tokenizer=tokenizer, prior=PriorConfig(width=16, num_layers=1, num_heads=2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = IGPG(config, normalizers(), DATA)
    stage = tokenizer_stage(generator)
    stage.setup([weight_batch(SMALL, 16)], 0)
    engine, batch = LocalEngine(stage), weight_batch(SMALL, 16)
    before = float(engine.evaluate(batch, noise_for(16))["reconstruction"])
    for step in range(30):
        engine.train_step(batch, noise_for(16, seed=step), 3e-3)
    after = float(engine.evaluate(batch, noise_for(16))["reconstruction"])
    # Straight through, a step may overshoot; none of them may fall apart.
    assert after < before * 1.2
    assert after < 0.5
    prior = LocalEngine(generator.stages()[1])
    assert bool(prior.train_step(batch, noise_for(16), 1e-3)["loss"].isfinite())
    task_loss = LocalEngine(generator.stages()[2])
    assert bool(task_loss.train_step(batch, noise_for(16), 1e-3)["loss"].isfinite())
    written = generator.generate(GenerationRequest(condition=batch.condition, layout=batch.layout, noise=noise_for(16)))
    assert bool(written.values_BD.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gumbel", "num_levels": 3}, "must divide chunk_length=16"),
        ({"kind": "finite_scalar", "num_codes": 200}, "such as 196"),
        ({"beam": 0}, "beam=0"),
    ],
)
def test_sizes_that_make_no_tokeniser_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(quantiser=QuantiserConfig(**settings))


def test_begin_depends_on_its_seed_alone() -> None:
    codebooks = []
    for seed in (3, 3, 4):
        generator = igpg()
        tokenizer_stage(generator).setup([weight_batch(SMALL, 16)], seed)
        codebooks.append(generator.tokenizer.quantiser.codebooks_LVK)
    assert torch.equal(codebooks[0], codebooks[1])
    assert not torch.equal(codebooks[0], codebooks[2])


@pytest.mark.parametrize("coder", ["mlp", "transformer"])
def test_a_step_may_see_a_window_of_each_network_and_what_it_sees_is_coded_as_in_the_whole(coder: str) -> None:
    sizes = replace(igpg_config().tokenizer, chunk_length=4, coder=coder, context=2, window=4)
    generator, batch = igpg(replace(igpg_config(), tokenizer=sizes)), weight_batch(SMALL, 6)
    tokenizer, layout = generator.tokenizer, batch.layout
    chunks_BMK = tokenizer.chunks(batch.values_BD, layout, generator.normalizer(layout))
    positions_MG, mask_MK = tokenizer.positions(layout), tokenizer.mask(layout)
    assert len(mask_MK) == 10
    codes_BML = tokenizer.encode(chunks_BMK, positions_MG, mask_MK)
    error_BMK = (tokenizer.decode(codes_BML, positions_MG, mask_MK) - chunks_BMK).square() * mask_MK
    block = 2 if coder == "transformer" else 1
    first_B = random_windows(noise_for(6), 10 // block, 4 // block)[:, 0] * block
    seen = [(error_BMK[b, first : first + 4], mask_MK[first : first + 4]) for b, first in enumerate(first_B.tolist())]
    expected = sum(error.sum() for error, _ in seen) / sum(mask.sum() for _, mask in seen)
    found = tokenizer_stage(generator).eval()(batch, noise_for(6)).metrics["reconstruction"]
    torch.testing.assert_close(found, expected)


def test_a_window_as_long_as_the_network_is_the_network() -> None:
    losses = []
    for window in (0, 5, 100):
        sizes = replace(igpg_config().tokenizer, window=window)
        generator = igpg(replace(igpg_config(), tokenizer=sizes))
        losses.append(tokenizer_stage(generator)(weight_batch(), noise_for(8)).loss)
    assert len(generator.tokenizer.mask(layout_of())) == 5
    assert losses[0] == losses[1] == losses[2]


def test_windows_train_the_tokeniser() -> None:
    sizes = replace(igpg_config().tokenizer, window=2)
    generator = igpg(replace(igpg_config(), tokenizer=sizes))
    stage = tokenizer_stage(generator)
    stage.setup([weight_batch(), weight_batch(DEEP)], 0)
    losses = train(stage, [weight_batch(SMALL, 32)] * 60, 1e-2)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_first_vectors_are_thinned_out_evenly_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raywgen.generators.common.tokenizer.stage._MOST_KEPT_VECTORS", 1000)
    sample = _VectorSample(torch.Generator().manual_seed(0))
    parts = [torch.full((400, 2), float(part)) for part in range(20)]
    kept_NK = torch.empty(0, 2)
    for number, vectors_NK in enumerate(parts, start=1):
        sample.add(vectors_NK, vectors_NK + 0.5)
        kept_NK, masks_NK = sample.all(10_000)
        assert len(kept_NK) <= 1000
        assert torch.equal(masks_NK, kept_NK + 0.5)
        if number == 2:
            assert torch.equal(kept_NK, torch.cat(parts[:2])), "all of a few"
    # One in eight or sixteen of each part, whether it came first or last.
    counts = kept_NK[:, 0].long().bincount(minlength=20)
    assert int(counts.min()) >= 0.5 * int(counts.max()) > 0
    assert len(sample.all(30)[0]) == 30
