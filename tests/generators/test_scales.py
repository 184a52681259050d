"""Scale tokens: there and back, the closed loop, padding, units that the layout alone gives, and all that uses them.

Shape legend: B networks, D values, M chunks, K values of a chunk, G groups, X numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raywgen.generation import TrainedGenerator, UnknownLayoutWarning
from raywgen.generators.bundle import load_bundle, save_bundle
from raywgen.generators.igpg import IGPG, IGPGConfig, SamplingConfig, TokenizerConfig
from raywgen.generators.igpg.scales import scaled_chunks
from raywgen.generators.igpg.stages import FunctionalStage, PriorStage, token_nll
from raywgen.generators.igpg.tokenizer import Tokenizer, masked_reconstruction_loss
from raywgen.generators.mcdi.config import McDiConfig
from raywgen.generators.task_loss import task_loss
from raywgen.weights import Layout, ReferenceTable, WeightReference, layout_reference
from raywgen.weights.chunks import chunk_mask, num_place_features, place_features, to_chunks
from raywgen.weights.groups import groups_of
from raywgen.weights.layout import KINDS
from tests.builders import (
    SMALL,
    condition,
    igpg,
    igpg_config,
    layout_of,
    network,
    noise_for,
    references,
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
CONVOLUTIONAL = Layout.from_state_dict(
    nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3)).state_dict()
)


def drawn(num: int, seed: int, spread: float = 2.0) -> Tensor:
    """Networks of the convolutional layout in its units: tensors of sizes `e^(spread * normal)` about such means."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for spec in CONVOLUTIONAL.generated:
        size_B1, mean_B1 = torch.randn(2, num, 1, generator=generator)
        part_BX = torch.randn(num, spec.num_values, generator=generator) * (spread * size_B1).exp()
        parts.append(part_BX + mean_B1 * (len(spec.shape) < 2))
    return torch.cat(parts, dim=1)


def config_of(mode: str, **settings: Any) -> IGPGConfig:
    config = igpg_config()
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, scales=mode, **settings))


def own_starts(*widths: tuple[int, ...]) -> ReferenceTable:
    """References of networks that share no start."""
    layouts = {each: layout_of(each) for each in widths or (SMALL, WIDE)}
    return {
        layout.id: (layout, WeightReference.measure(layout, values_of(each), None)) for each, layout in layouts.items()
    }


def shaken(generator: IGPG) -> IGPG:
    """With an encoder, a decoder and a correction that do something."""
    draws = torch.Generator().manual_seed(0)
    parts = (generator.tokenizer.encoder, generator.tokenizer.decoder, generator.correction)
    with torch.no_grad():
        for part in parts:
            for parameter in part.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return generator


@torch.no_grad()
def tokenizer_of(mode: str, layout: Layout = CONVOLUTIONAL) -> Tokenizer:
    """With k-means codebooks of drawn networks."""
    tokenizer = Tokenizer(TokenizerConfig(chunk_length=8, num_levels=2, num_codes=16, width=16, scales=mode)).eval()
    reference = layout_reference(layout)
    chunks_BMK = tokenizer.chunks(reference.denormalise(drawn(40, 1)), layout, reference, by_code=False)
    tokenizer.quantiser.initialise(chunks_BMK.flatten(0, 1), 5, torch.Generator().manual_seed(0))
    return tokenizer


def within_groups(error_BD: Tensor, values_BD: Tensor, mode: str) -> float:
    """The largest error in units of its group's root mean square."""
    groups = groups_of(CONVOLUTIONAL, mode)
    return float((error_BD.detach() / groups.over_values(groups.sizes(values_BD))).abs().max())


@given(seed=st.integers(0, 999), mode=st.sampled_from(MODES), chunk_length=st.sampled_from([3, 8, 64]))
@settings(max_examples=30, deadline=None)
def test_there_and_back_is_the_same(seed: int, mode: str, chunk_length: int) -> None:
    scaled, values_BD = scaled_chunks(CONVOLUTIONAL, mode, chunk_length), drawn(3, seed)
    chunks_BMK = scaled.encode(values_BD, lambda leading_BMK, part: leading_BMK)
    assert chunks_BMK.shape == (3, *scaled.mask_MK.shape)
    # A mean of many sizes is subtracted and added; asinh, sinh, log and exp cost a few ulps more.
    assert within_groups(scaled.decode(chunks_BMK) - values_BD, values_BD, mode) < 1e-4


@given(seed=st.integers(0, 999), mode=st.sampled_from(MODES), noise=st.floats(0, 0.5))
@settings(max_examples=30, deadline=None)
def test_an_error_in_the_scales_code_is_none_in_the_weights(seed: int, mode: str, noise: float) -> None:
    scaled, values_BD = scaled_chunks(CONVOLUTIONAL, mode, 8), drawn(3, seed, spread=1.0)
    generator = torch.Generator().manual_seed(seed)

    def kept(leading_BMK: Tensor, part: slice) -> Tensor:
        written.append(leading_BMK + noise * torch.randn(leading_BMK.shape, generator=generator))
        return written[-1]

    written: list[Tensor] = []
    closed_BMK = scaled.encode(values_BD, kept)
    closed_BMK[:, : scaled.num_leading] = torch.cat(written, dim=1)
    assert within_groups(scaled.decode(closed_BMK) - values_BD, values_BD, mode) < 1e-4
    # Without the loop the same error is that of the weights.
    open_BMK = scaled.encode(values_BD, lambda leading_BMK, part: leading_BMK)
    open_BMK[:, : scaled.num_leading] = torch.cat(written, dim=1)
    if noise > 0.1:
        assert within_groups(scaled.decode(open_BMK) - values_BD, values_BD, mode) > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_wrong_by_what_the_values_code_loses_alone(mode: str) -> None:
    tokenizer, reference = tokenizer_of(mode), layout_reference(CONVOLUTIONAL)
    values_BD = drawn(4, 2)
    chunks_BMK = tokenizer.chunks(reference.denormalise(values_BD), CONVOLUTIONAL, reference)
    places_MG, mask_MK = tokenizer.places(CONVOLUTIONAL), tokenizer.mask(CONVOLUTIONAL)
    decoded_BMK = tokenizer.decode(tokenizer.encode(chunks_BMK, places_MG, mask_MK), places_MG)
    back_BD = reference.normalise(tokenizer.values(decoded_BMK, CONVOLUTIONAL, reference))
    first = tokenizer.num_leading(CONVOLUTIONAL)
    lead_BMK = decoded_BMK[:, :first]
    assert float(((lead_BMK.detach() - chunks_BMK[:, :first]) * mask_MK[:first]).abs().max()) > 0.1
    # Values with no loss of their own come back under the same coded scales.
    exact_BMK = torch.cat([lead_BMK, chunks_BMK[:, first:]], dim=1)
    exact_BD = reference.normalise(tokenizer.values(exact_BMK, CONVOLUTIONAL, reference))
    assert within_groups(exact_BD - values_BD, values_BD, mode) < 1e-3
    assert within_groups(back_BD - values_BD, values_BD, mode) > 0.1


@given(seed=st.integers(0, 9999), mode=st.sampled_from(MODES), size=st.floats(0.1, 1e6))
@settings(max_examples=40, deadline=None)
def test_running_variances_stay_positive_whatever_is_written(seed: int, mode: str, size: float) -> None:
    tokenizer = Tokenizer(TokenizerConfig(chunk_length=8, num_levels=2, num_codes=8, width=8, scales=mode))
    shape = (2, *tokenizer.mask(CONVOLUTIONAL).shape)
    chunks_BMK = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    chunks_BMK.requires_grad_()
    values_BD = tokenizer.values(chunks_BMK, CONVOLUTIONAL, layout_reference(CONVOLUTIONAL))
    assert bool((CONVOLUTIONAL.unflatten(values_BD)["1.running_var"] > 0).all())
    assert bool(values_BD.isfinite().all())
    values_BD.sum().backward()
    assert chunks_BMK.grad is not None
    assert bool(chunks_BMK.grad.isfinite().all())


@pytest.mark.parametrize(("mode", "num_scales"), [("tensor", 8), ("filter", 5 + 3 + 6)])
def test_bits_of_scales_are_counted(mode: str, num_scales: int) -> None:
    tokenizer = tokenizer_of(mode)
    num_chunks = math.ceil(6 / 8) + math.ceil(num_scales / 8) + math.ceil(CONVOLUTIONAL.num_values / 8)
    codes_BML = tokenizer.encode(
        torch.zeros(1, num_chunks, 8), tokenizer.places(CONVOLUTIONAL), tokenizer.mask(CONVOLUTIONAL)
    )
    assert codes_BML.shape == (1, num_chunks, 2)
    assert tokenizer.bits_per_value(CONVOLUTIONAL) == pytest.approx(codes_BML.numel() * 4 / CONVOLUTIONAL.num_values)
    assert tokenizer.mask(CONVOLUTIONAL).sum() == 6 + num_scales + CONVOLUTIONAL.num_values


@pytest.mark.parametrize("mode", MODES)
def test_padding_has_no_say(mode: str) -> None:
    tokenizer, reference = tokenizer_of(mode), layout_reference(CONVOLUTIONAL)
    chunks_BMK = tokenizer.chunks(reference.denormalise(drawn(4, 3)), CONVOLUTIONAL, reference)
    places_MG, mask_MK = tokenizer.places(CONVOLUTIONAL), tokenizer.mask(CONVOLUTIONAL)
    is_padding_MK = mask_MK == 0
    assert bool(is_padding_MK[: tokenizer.num_leading(CONVOLUTIONAL)].any())
    codes_BML = tokenizer.encode(chunks_BMK, places_MG, mask_MK)
    garbage_BMK = torch.where(is_padding_MK, torch.tensor(1e3), chunks_BMK)
    # An untrained encoder passes chunks on, so that garbage would reach the codes.
    assert torch.equal(tokenizer.encode(garbage_BMK, places_MG, mask_MK), codes_BML)
    decoded_BMK = tokenizer.decode(codes_BML, places_MG)
    spoilt_BMK = torch.where(is_padding_MK, torch.tensor(1e3), decoded_BMK)
    for back_BMK in (decoded_BMK, spoilt_BMK):
        assert torch.equal(
            tokenizer.values(back_BMK, CONVOLUTIONAL, reference),
            tokenizer.values(decoded_BMK, CONVOLUTIONAL, reference),
        )
    assert torch.equal(
        masked_reconstruction_loss(chunks_BMK, decoded_BMK, mask_MK),
        masked_reconstruction_loss(garbage_BMK, spoilt_BMK, mask_MK),
    )


@pytest.mark.parametrize("mode", MODES)
def test_places_say_what_leading_chunks_hold(mode: str) -> None:
    tokenizer = tokenizer_of(mode)
    places_MG, first = tokenizer.places(CONVOLUTIONAL), tokenizer.num_leading(CONVOLUTIONAL)
    assert places_MG.shape == (len(tokenizer.mask(CONVOLUTIONAL)), tokenizer.num_place_features)
    assert places_MG[:, -2].tolist() == [1.0] + [0.0] * (len(places_MG) - 1)
    assert places_MG[:, -1].tolist() == [0.0] + [1.0] * (first - 1) + [0.0] * (len(places_MG) - first)
    assert torch.equal(places_MG[first:, :-2], place_features(CONVOLUTIONAL, 8))
    assert len(torch.unique(places_MG, dim=0)) == len(places_MG)
    # Scales begin with the weights', means with the biases'.
    kinds = places_MG[:first, : len(KINDS)].argmax(dim=1)
    assert [KINDS[kind] for kind in kinds[:2]] == ["bias", "weight"]
    again = Layout.from_json(CONVOLUTIONAL.to_json())
    assert torch.equal(tokenizer.places(again), places_MG)


def test_like_tensors_stand_side_by_side() -> None:
    numbers_BX = torch.arange(8.0).unsqueeze(0)
    groups = groups_of(CONVOLUTIONAL, "tensor")
    values_BD = groups.over_values((numbers_BX - 3).sinh().exp())
    values_BD = values_BD - groups.means_over_values(groups.means(values_BD))
    chunks_BMK = scaled_chunks(CONVOLUTIONAL, "tensor", 8).encode(values_BD, lambda chunks_BMK, part: chunks_BMK)
    # In the layout: weight, bias, norm scale, shift, mean, variance, weight, bias; of constant vectors nothing is left.
    assert chunks_BMK[0, 1].tolist() == pytest.approx([-6, 6, -6, -6, -6, -6, -6, -6], abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_larger_tensor_changes_its_scale_alone(mode: str) -> None:
    tokenizer, reference = tokenizer_of(mode), layout_reference(CONVOLUTIONAL)
    values_BD = reference.denormalise(drawn(2, 4, spread=0.3))
    larger_BD = values_BD.clone()
    larger_BD[:, :90] *= 1.5
    first = tokenizer.num_leading(CONVOLUTIONAL)
    one_BMK, other_BMK = (
        tokenizer.chunks(each_BD, CONVOLUTIONAL, reference, by_code=False) for each_BD in (values_BD, larger_BD)
    )
    torch.testing.assert_close(one_BMK[:, first:], other_BMK[:, first:], rtol=1e-4, atol=1e-5)
    moved_BX = ((other_BMK / 2).sinh() - (one_BMK / 2).sinh())[:, 1:first].flatten(1)
    num = 1 if mode == "tensor" else 5
    torch.testing.assert_close(moved_BX[:, :num], torch.full((2, num), math.log(1.5)), rtol=1e-4, atol=1e-5)
    assert float(moved_BX[:, num:].abs().max()) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_the_layout_is_known_outside_the_tokens(mode: str) -> None:
    generator = shaken(igpg(config_of(mode), own_starts()))
    values_BD, layout = values_of(WIDE)[:4], layout_of(WIDE)
    stranger = IGPG(config_of(mode), own_starts(SMALL), generator.data).eval()
    stranger.load_state_dict(generator.state_dict())
    assert not stranger.knows(layout)
    assert torch.equal(stranger.tokens(values_BD, layout), generator.tokens(values_BD, layout))
    assert torch.equal(stranger.reconstruct(values_BD, layout), generator.reconstruct(values_BD, layout))
    told = condition(4)
    one, other = (each.generate(told, layout, noise_for(4)) for each in (generator, stranger))
    assert torch.equal(one.values_BD, other.values_BD)
    assert one.log_prob_B is not None
    assert other.log_prob_B is not None
    assert torch.equal(one.log_prob_B, other.log_prob_B)
    assert torch.equal(stranger.log_prob(values_BD, told, layout), generator.log_prob(values_BD, told, layout))


@pytest.mark.parametrize("mode", MODES)
def test_of_a_shared_start_weights_lie_about_it(mode: str) -> None:
    layout, table = layout_of(), references(SMALL)
    generator, base_D = igpg(config_of(mode), table), table[layout.id][1].base_D
    moved = IGPG(
        config_of(mode),
        {layout.id: (layout, WeightReference(base_D=base_D.flip(0), scale_D=7 * torch.ones_like(base_D)))},
        generator.data,
    ).eval()
    moved.load_state_dict(generator.state_dict())
    values_BD = values_of()[:4]
    shifted_BD = values_BD - base_D + base_D.flip(0)
    # A sum and a difference round, which may move a value between two codes that are equally near.
    codes, others = generator.tokens(values_BD, layout), moved.tokens(shifted_BD, layout)
    assert float((codes == others).float().mean()) > 0.98
    start_BD = generator.reference(layout).base_D.expand(1, -1)
    exact_BMK = generator.tokenizer.chunks(start_BD, layout, generator.reference(layout), by_code=False)
    assert bool((exact_BMK[:, 0] == 0).all())


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_layout_is_filled_without_a_guess(mode: str, tmp_path: Path) -> None:
    save_bundle(shaken(igpg(config_of(mode), own_starts(SMALL))), tmp_path, {})
    trained = TrainedGenerator(load_bundle(tmp_path))
    module, layout = network(WIDE), layout_of(WIDE)
    reference = trained.guessed_reference(layout, module)
    assert reference is not None
    assert torch.equal(reference.base_D, layout_reference(layout).base_D)
    told = condition(1)
    with pytest.warns(UnknownLayoutWarning):
        trained.fill(module, instruction=told.instructions[0], data=(told.samples_BSF[0], told.labels_BS[0]))
    assert bool(layout.flatten(module.state_dict()).isfinite().all())
    related = TrainedGenerator(igpg(config_of(mode), references(SMALL)))
    start_D = layout.flatten(network(WIDE).state_dict())
    reference = related.guessed_reference(layout, network(WIDE))
    assert reference is not None
    assert torch.equal(reference.base_D, start_D)
    with pytest.raises(AssertionError, match="no reference"):
        related.generator.generate(told, layout, noise_for(1))


@pytest.mark.parametrize("mode", MODES)
def test_a_bundle_writes_what_its_generator_writes(mode: str, tmp_path: Path) -> None:
    generator = shaken(igpg(config_of(mode), references(SMALL, WIDE)))
    save_bundle(generator, tmp_path, {})
    again = load_bundle(tmp_path)
    one, other = (each.generate(condition(3), layout_of(), noise_for(3)).values_BD for each in (generator, again))
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
    tokenizer_stage(generator).begin([weight_batch(SMALL, 16)], 0)
    layout = layout_of()
    chunks_BMK = generator.tokenizer.chunks(values_of()[:16], layout, generator.reference(layout), by_code=False)
    first = generator.tokenizer.num_leading(layout)
    assert float(chunks_BMK[:, first:].flatten(1)[:, :38].square().mean()) == pytest.approx(1.0, abs=0.05)
    decoded_BMK = generator.tokenizer.quantiser.decode(generator.tokens(values_of()[:16], layout))
    assert float(decoded_BMK[:, first:-1].square().mean()) > 0.5


def test_every_stage_learns() -> None:
    generator = igpg(config_of("filter", num_levels=4, num_codes=64), references(SMALL, WIDE))
    batches = [weight_batch((SMALL, WIDE)[step % 2], 16, seed=step) for step in range(40)]
    stage = tokenizer_stage(generator)
    stage.begin(batches[:2], 0)
    losses = train(stage, batches * 2)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    losses = train(PriorStage(generator.prior, generator.tokenizer, generator.references), batches)
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    functional = FunctionalStage(
        igpg_config().functional, generator.prior, generator.correction, generator.tokenizer, generator.references
    )
    losses = train(functional, batches, learning_rate=5e-3)
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


@pytest.mark.parametrize("mode", MODES)
def test_the_tasks_gradient_reaches_scales_and_no_padding(mode: str) -> None:
    generator, batch = igpg(config_of(mode), own_starts()), weight_batch(num=3)
    tokenizer, reference = generator.tokenizer, generator.reference(batch.layout)
    chunks_BMK = tokenizer.chunks(batch.values_BD, batch.layout, reference).double().requires_grad_()
    batch = dataclasses.replace(
        batch,
        module=copy.deepcopy(batch.module).double(),
        query=dataclasses.replace(batch.query, samples_BSF=batch.query.samples_BSF.double()),
    )
    double = Layout(tuple(dataclasses.replace(spec, dtype="float64") for spec in batch.layout.tensors))
    batch = dataclasses.replace(batch, layout=double)

    def loss(each_BMK: Tensor) -> Tensor:
        return task_loss(tokenizer.values(each_BMK, double, reference), batch)[0].sum()

    loss(chunks_BMK).backward()
    assert chunks_BMK.grad is not None
    is_real_MK, first, step = tokenizer.mask(double) > 0, tokenizer.num_leading(double), 1e-5
    assert bool((chunks_BMK.grad[:, ~is_real_MK] == 0).all())
    # The last layer's mean shift moves both logits alike, which no loss sees; it stands at the end of the means.
    is_felt_MK = is_real_MK[:first].clone()
    is_felt_MK[0, 1] = False
    assert bool((chunks_BMK.grad[:, :first][:, is_felt_MK] != 0).all())
    for place in [(0, 0, 1), (1, first - 1, 0), (2, first - 1, 2)]:
        shift_BMK = torch.zeros_like(chunks_BMK)
        shift_BMK[place] = step
        with torch.no_grad():
            numeric = float(loss(chunks_BMK + shift_BMK) - loss(chunks_BMK - shift_BMK)) / (2 * step)
        assert float(chunks_BMK.grad[place]) == pytest.approx(numeric, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_the_functional_stage_trains_what_writes_scales(mode: str) -> None:
    generator, batch = shaken(igpg(config_of(mode), own_starts())), weight_batch()
    stage = FunctionalStage(
        dataclasses.replace(igpg_config().functional, likelihood=0.0, anchor=0.0),
        generator.prior,
        generator.correction,
        generator.tokenizer,
        generator.references,
    )
    # Nothing but the flags of leading chunks feeds these columns.
    stage(batch, noise_for(8)).loss.backward()
    gradient = generator.correction.place.weight.grad
    assert gradient is not None
    assert float(gradient[:, -2:].abs().sum()) > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", [{}, {"windows": "parallel"}, {"chunks": "independent"}])
def test_windows_hold_leading_chunks_as_any_others(mode: str, sampling: dict[str, Any]) -> None:
    config = config_of(mode)
    config.prior.window = 3
    generator, layout, told = igpg(config, references(SMALL, WIDE)), layout_of(WIDE), condition(4)
    asked = SamplingConfig(decoding="tokens", **sampling)
    places_MG = generator.tokenizer.places(layout)
    rollout = generator.prior.rollout(told, places_MG, generator.tokenizer.quantiser, noise_for(4), 1.0, asked)
    assert rollout.codes_BML.shape[1] == len(generator.tokenizer.mask(layout))
    written = generator.generate(told, layout, noise_for(4), sampling=asked)
    read_BM = generator.prior.log_likelihood(rollout.codes_BML, told, places_MG, generator.tokenizer.quantiser, asked)
    assert written.log_prob_B is not None
    torch.testing.assert_close(written.log_prob_B, read_BM.sum(dim=1), rtol=1e-4, atol=1e-3)
    nll = token_nll(generator.prior, generator.tokenizer, weight_batch(WIDE), generator.references, noise_for(8))
    assert bool(nll.isfinite())


def test_scales_of_the_corpus_are_as_they_were() -> None:
    generator, layout = igpg(), layout_of()
    tokenizer, reference = generator.tokenizer, generator.reference(layout)
    normalised_BMK = to_chunks(reference.normalise(values_of()), 8)
    assert torch.equal(tokenizer.chunks(values_of(), layout, reference), normalised_BMK)
    assert tokenizer.places(layout) is place_features(layout, 8)
    assert torch.equal(tokenizer.mask(layout), chunk_mask(layout, 8))
    assert tokenizer.num_leading(layout) == 0
    assert tokenizer.num_place_features == num_place_features()
    assert tokenizer.bits_per_value(layout) == pytest.approx(5 * 2 * 3 / 38)


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="reference, tensor, filter"):
        TokenizerConfig(scales="row")
    with pytest.raises(ValueError, match="give reference"):
        McDiConfig(tokenizer=TokenizerConfig(scales="filter"))


def test_evaluation_of_the_stage_is_of_values_alone() -> None:
    generator, batch = igpg(config_of("tensor")), weight_batch()
    tokenizer, layout = generator.tokenizer, batch.layout
    metrics = tokenizer_stage(generator).eval()(batch, noise_for(8)).metrics
    chunks_BMK = tokenizer.chunks(batch.values_BD, layout, generator.reference(layout))
    decoded_BMK = tokenizer.decode(generator.tokens(batch.values_BD, layout), tokenizer.places(layout))
    first = tokenizer.num_leading(layout)
    of_values = [each_BMK[:, first:].flatten(1)[:, :38] for each_BMK in (chunks_BMK, decoded_BMK)]
    noise = (of_values[0] - of_values[1]).square().mean()
    assert float(metrics["snr_db"]) == pytest.approx(
        float(10 * torch.log10(of_values[0].square().mean() / noise)), abs=1e-3
    )


def test_moving_codebooks_keep_the_loop_closed() -> None:
    generator, batch = igpg(config_of("filter", num_levels=1)), weight_batch(num=16)
    stage = tokenizer_stage(generator)
    layout, reference = batch.layout, generator.reference(batch.layout)
    before_BMK = generator.tokenizer.chunks(batch.values_BD, layout, reference)
    stage.train()(batch, noise_for(16))
    stage.after_step(same)
    after_BMK = generator.tokenizer.chunks(batch.values_BD, layout, reference)
    first = generator.tokenizer.num_leading(layout)
    assert torch.equal(before_BMK[:, 0], after_BMK[:, 0])
    assert not torch.equal(before_BMK[:, first:], after_BMK[:, first:])
