"""IGPG as a generator: stages, layouts, noise, decodings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from raywgen.generators import GenerationRequest
from raywgen.generators.igpg import IGPG, SamplingConfig
from raywgen.generators.igpg.token_sampling import sample_tokens
from raywgen.weights import Normalizer
from tests.builders import (
    DEEP,
    SMALL,
    condition,
    igpg,
    igpg_config,
    layout_of,
    noise_for,
    normalizers,
    part_of,
    values_of,
)


@pytest.fixture(scope="module")
def generator() -> IGPG:
    built = igpg()
    with torch.no_grad():
        for parameter in built.residual_head.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return built


@pytest.mark.parametrize(
    ("off", "left"),
    [
        ((), ["tokenizer", "prior", "task_loss"]),
        (("task_loss",), ["tokenizer", "prior"]),
        (("tokenizer", "prior"), ["task_loss"]),
        (("tokenizer", "prior", "task_loss"), []),
    ],
)
def test_stages_are_in_order_and_switched_off_by_no_steps(off: tuple[str, ...], left: list[str]) -> None:
    config = igpg_config()
    changed = {name: dataclasses.replace(getattr(config, name), num_steps=0) for name in off}
    assert [stage.name for stage in igpg(dataclasses.replace(config, **changed)).stages()] == left


@pytest.mark.parametrize("widths", [SMALL, DEEP])
@pytest.mark.parametrize("decoding", ["expected", "tokens"])
def test_generates_every_known_layout(generator: IGPG, widths, decoding) -> None:
    layout = layout_of(widths)
    written = generator.generate(
        GenerationRequest(
            condition=condition(3), layout=layout, noise=noise_for(3), sampling=SamplingConfig(decoding=decoding)
        )
    )
    assert written.values_BD.shape == (3, layout.num_values)
    assert bool(written.values_BD.isfinite().all())
    assert written.log_prob_B is not None
    assert bool((written.log_prob_B < 0).all())
    assert not written.values_BD.requires_grad


def test_decoded_tokens_are_the_decoders_of_the_rollout(generator: IGPG) -> None:
    layout, cond = layout_of(), condition(3)
    tokenizer = generator.tokenizer
    table = tokenizer.table(layout)
    sample = sample_tokens(generator.prior, cond, table, tokenizer.quantiser, noise_for(3), 1.0)
    decoded_BMK = tokenizer.decode(sample.codes_BML, table.positions_MG)
    expected_BD = tokenizer.values(decoded_BMK, layout, generator.normalizer(layout))
    written = generator.generate(
        GenerationRequest(condition=cond, layout=layout, noise=noise_for(3), sampling=SamplingConfig(decoding="tokens"))
    )
    assert torch.equal(written.values_BD, expected_BD)


def test_the_residual_head_is_for_the_expected_code_alone(generator: IGPG) -> None:
    layout, cond = layout_of(), condition(3)
    plain = igpg()
    plain.prior.load_state_dict(generator.prior.state_dict())
    results = {
        (name, decoding): built.generate(
            GenerationRequest(
                condition=cond, layout=layout, noise=noise_for(3), sampling=SamplingConfig(decoding=decoding)
            )
        ).values_BD
        for name, built in (("corrected", generator), ("plain", plain))
        for decoding in ("expected", "tokens")
    }
    assert torch.equal(results["corrected", "tokens"], results["plain", "tokens"])
    assert not torch.allclose(results["corrected", "expected"], results["plain", "expected"], atol=1e-4)


def test_temperature_zero_is_deterministic_and_one_is_not(generator: IGPG) -> None:
    layout, cond = layout_of(), condition(3)
    cold = [
        generator.generate(
            GenerationRequest(condition=cond, layout=layout, noise=noise_for(3, seed), temperature=0.0)
        ).values_BD
        for seed in (1, 2)
    ]
    warm = [
        generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(3, seed))).values_BD
        for seed in (1, 2, 1)
    ]
    assert torch.equal(cold[0], cold[1])
    assert not torch.equal(warm[0], warm[1])
    assert torch.equal(warm[0], warm[2])


def test_four_networks_at_once_are_two_and_two(generator: IGPG) -> None:
    layout, cond = layout_of(), condition(4)
    together = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(4)))
    for part in (slice(0, 2), slice(2, 4)):
        alone = generator.generate(
            GenerationRequest(condition=part_of(cond, part), layout=layout, noise=noise_for(2, first=part.start))
        )
        # The tokens are the same; matrix products of other batch sizes round differently.
        torch.testing.assert_close(alone.values_BD, together.values_BD[part], rtol=1e-5, atol=1e-5)


def test_reconstruction_is_decoded_tokens_and_close_to_the_weights(generator: IGPG) -> None:
    layout = layout_of()
    values_BD = values_of()[:8]
    codes_BML = generator.tokens(values_BD, layout)
    assert codes_BML.shape == (8, 5, 2)
    assert int(codes_BML.max()) < 8
    back_BD = generator.reconstruct(values_BD, layout)
    base_D = generator.normalizer(layout).base_D
    assert float((back_BD - values_BD).square().mean()) < 0.6 * float((base_D - values_BD).square().mean())


def test_an_unknown_layout_needs_a_normaliser() -> None:
    generator, layout = igpg(table=normalizers(SMALL)), layout_of(DEEP)
    with pytest.raises(AssertionError, match="no normaliser"):
        generator.generate(GenerationRequest(condition=condition(2), layout=layout, noise=noise_for(2)))
    num_tensors = len(layout.generated)
    given = Normalizer(layout, torch.full((num_tensors,), 7.0), torch.zeros(num_tensors))
    written = generator.generate(
        GenerationRequest(condition=condition(2), layout=layout, noise=noise_for(2), normalizer=given)
    )
    assert torch.equal(written.values_BD, torch.full((2, layout.num_values), 7.0))


def test_the_condition_reaches_the_weights(generator: IGPG) -> None:
    layout = layout_of()
    cond = [condition(2, seed) for seed in (0, 1)]
    written = [
        generator.generate(
            GenerationRequest(condition=each, layout=layout, noise=noise_for(2), temperature=0.0)
        ).values_BD
        for each in cond
    ]
    assert not torch.equal(written[0], written[1])
