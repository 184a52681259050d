"""Drawing: truncation, guidance, averaging, shuffled conditions.

Shape legend: B networks, M chunks, H width.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from raywgen.config import ConfigError, load_config
from raywgen.generation import GenerateConfig, SamplingError, generate_best
from raywgen.generators import GenerationRequest
from raywgen.generators.igpg import IGPG, SamplingConfig
from raywgen.generators.igpg.config import Chunks
from raywgen.generators.igpg.shuffled_conditions import ShuffleError, shuffled_conditions
from raywgen.generators.igpg.token_sampling import GuidanceError, sample_tokens
from raywgen.weights import Condition
from tests.builders import condition, hypernetwork, igpg, igpg_config, layout_of, network, noise_for


def generator_that_forgets() -> IGPG:
    config = igpg_config()
    config.prior.condition_dropout = 0.2
    built = igpg(config)
    dropped = built.prior.condition.dropped
    assert dropped is not None
    with torch.no_grad():
        for parameter in (dropped, built.prior.head.query, built.prior.head.free, built.prior.head.bias):
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return built


@pytest.fixture(scope="module")
def generator() -> IGPG:
    return generator_that_forgets()


def sample(
    generator: IGPG,
    sampling: SamplingConfig,
    temperature: float = 1.0,
    seed: int = 0,
    given: Condition | None = None,
):
    tokenizer = generator.tokenizer
    table = tokenizer.table(layout_of())
    cond = condition(4) if given is None else given
    return sample_tokens(generator.prior, cond, table, tokenizer.quantiser, noise_for(4, seed), temperature, sampling)


def test_guidance_one_is_no_guidance_even_where_it_is_computed(generator: IGPG) -> None:
    plain = sample(generator, SamplingConfig())
    # So near to 1 that both sides are computed and mixed.
    near = sample(generator, SamplingConfig(guidance=1 + 1e-7))
    assert torch.equal(plain.codes_BML, near.codes_BML)
    torch.testing.assert_close(plain.log_prob_BM, near.log_prob_BM, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.expected_BMK, near.expected_BMK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", ["coherent", "independent"])
def test_guidance_zero_is_unconditional(generator: IGPG, chunks: Chunks) -> None:
    """The same as where instruction and samples are left out of the only side there is."""
    free = sample(generator, SamplingConfig(guidance=0.0, chunks=chunks))
    nothing = condition(4).reading(instruction=False, samples=False)
    forgotten = sample(generator, SamplingConfig(chunks=chunks), given=nothing)
    assert torch.equal(free.codes_BML, forgotten.codes_BML)
    torch.testing.assert_close(free.expected_BMK, forgotten.expected_BMK, rtol=1e-4, atol=1e-5)
    # Likelihoods stay those of the condition that was given.
    assert not torch.allclose(free.log_prob_BM, forgotten.log_prob_BM, atol=1e-3)


def test_log_prob_is_given_the_condition_whatever_the_guidance(generator: IGPG) -> None:
    tokenizer = generator.tokenizer
    table = tokenizer.table(layout_of())
    drawn = sample(generator, SamplingConfig(guidance=3.0, top_k=3), temperature=0.7)
    with torch.no_grad():
        read_BM = generator.prior.log_likelihood(drawn.codes_BML, condition(4), table, tokenizer.quantiser)
    # Cached and full attention round differently.
    torch.testing.assert_close(drawn.log_prob_BM, read_BM, rtol=1e-4, atol=1e-4)


def test_guidance_of_a_prior_that_never_forgot_is_refused() -> None:
    with pytest.raises(GuidanceError, match=r"condition_dropout=0 .*train it with 0.1"):
        igpg().generate(
            GenerationRequest(
                condition=condition(2), layout=layout_of(), noise=noise_for(2), sampling=SamplingConfig(guidance=2.0)
            )
        )


@pytest.mark.parametrize("sampling", [SamplingConfig(top_k=1), SamplingConfig(top_p=1e-6)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_one_code_to_draw_from_is_argmax(generator: IGPG, sampling: SamplingConfig, guidance: float) -> None:
    sampling = dataclasses.replace(sampling, guidance=guidance)
    argmax = sample(generator, sampling, temperature=0.0)
    for seed in (1, 2):
        drawn = sample(generator, sampling, temperature=1.0, seed=seed)
        assert torch.equal(drawn.codes_BML, argmax.codes_BML)


def test_top_k_and_top_p_of_all_change_nothing_and_less_does(generator: IGPG) -> None:
    plain = sample(generator, SamplingConfig())
    every = sample(generator, SamplingConfig(top_k=8, top_p=1.0))
    some = sample(generator, SamplingConfig(top_k=2))
    assert torch.equal(plain.codes_BML, every.codes_BML)
    assert not torch.equal(plain.codes_BML, some.codes_BML)


def test_a_bfloat16_cache_writes_nearly_the_same(generator: IGPG) -> None:
    full, half = (sample(generator, SamplingConfig(half_cache=on), temperature=0.0) for on in (False, True))
    same_BM = (full.codes_BML == half.codes_BML).float().mean()
    # An argmax may tip where two codes are nearly as likely.
    assert float(same_BM) > 0.9
    assert half.log_prob_BM.dtype == torch.float32


def test_compiled_steps_write_the_same_tokens(generator: IGPG) -> None:
    plain, compiled = (
        sample(generator, SamplingConfig(compile=compile_, guidance=2.0)) for compile_ in ("never", "always")
    )
    assert torch.equal(plain.codes_BML, compiled.codes_BML)
    torch.testing.assert_close(plain.log_prob_BM, compiled.log_prob_BM, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.expected_BMK, compiled.expected_BMK, rtol=1e-4, atol=1e-5)


def test_products_in_bfloat16_write_nearly_the_same(generator: IGPG) -> None:
    full, half = (sample(generator, SamplingConfig(precision=name), temperature=0.0) for name in ("fp32", "bf16"))
    # As above.
    assert float((full.codes_BML == half.codes_BML).float().mean()) > 0.9
    assert not torch.equal(full.log_prob_BM, half.log_prob_BM)
    torch.testing.assert_close(full.log_prob_BM, half.log_prob_BM, rtol=0.05, atol=0.2)


def test_an_average_is_the_mean_over_weights_and_one_of_it_is_what_one_would_be(generator: IGPG) -> None:
    cond, layout = condition(3), layout_of()
    three = generator.generate(
        GenerationRequest(condition=cond, layout=layout, noise=noise_for(3), sampling=SamplingConfig(num_averaged=3))
    )
    one = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(3)))
    parts = noise_for(3).split(torch.arange(3), 1)
    each = generator.generate(GenerationRequest(condition=cond.repeat(3), layout=layout, noise=parts))
    assert each.log_prob_B is not None
    torch.testing.assert_close(three.values_BD, each.values_BD.view(3, 3, -1).mean(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(three.log_prob_B, each.log_prob_B.view(3, 3).mean(dim=1), rtol=1e-5, atol=1e-4)
    # Products of other batch sizes round differently.
    torch.testing.assert_close(one.values_BD, each.values_BD[::3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(each.values_BD[0], each.values_BD[1], atol=1e-3)


def test_shuffled_conditions_are_those_of_other_instructions() -> None:
    cond = condition(4).repeat(2)
    moved = shuffled_conditions(cond)
    assert sorted(moved.instructions) == sorted(cond.instructions)
    for b, text in enumerate(moved.instructions):
        assert text != cond.instructions[b]
        source = (b + 2) % 8
        assert text == cond.instructions[source]
        assert torch.equal(moved.samples_BSF[b], cond.samples_BSF[source])
        assert torch.equal(moved.labels_BS[b], cond.labels_BS[source])
    for few in (condition(1), condition(1).repeat(3)):
        with pytest.raises(ShuffleError, match="several tasks at once"):
            shuffled_conditions(few)


def test_shuffled_is_what_the_moved_conditions_write(generator: IGPG) -> None:
    cond, layout = condition(4), layout_of()
    written = generator.generate(
        GenerationRequest(condition=cond, layout=layout, noise=noise_for(4), sampling=SamplingConfig(chunks="shuffled"))
    )
    moved = generator.generate(
        GenerationRequest(condition=shuffled_conditions(cond), layout=layout, noise=noise_for(4))
    )
    assert torch.equal(written.values_BD, moved.values_BD)


def test_log_prob_of_what_was_written_as_tokens(generator: IGPG) -> None:
    cond, layout = condition(3), layout_of()
    drawn = sample(generator, SamplingConfig())
    values_BD = torch.randn(3, layout.num_values, generator=torch.Generator().manual_seed(0))
    codes_BML = generator.tokens(values_BD, layout)
    assert codes_BML.shape == drawn.codes_BML[:3].shape
    tokenizer = generator.tokenizer
    with torch.no_grad():
        read_BM = generator.prior.log_likelihood(codes_BML, cond, tokenizer.table(layout), tokenizer.quantiser)
    torch.testing.assert_close(generator.log_prob(values_BD, cond, layout), read_BM.sum(dim=1), rtol=0, atol=0)


def test_best_of_n_passes_the_settings_on_and_refuses_them_where_nothing_is_drawn(generator: IGPG) -> None:
    cond = condition(2)
    settings = {"best_of": 2, "temperature": 1.0, "seed": 0}
    plain, cut = (
        generate_best(generator, cond, layout_of(), network(), sampling=sampling, **settings)  # pyright: ignore[reportArgumentType]
        for sampling in (None, SamplingConfig(top_k=1, decoding="tokens"))
    )
    assert not torch.equal(plain.values_BD, cut.values_BD)
    written = generator.generate(
        GenerationRequest(
            condition=cond, layout=layout_of(), noise=noise_for(2), sampling=SamplingConfig(top_k=1, decoding="tokens")
        )
    )
    torch.testing.assert_close(cut.values_BD, written.values_BD, rtol=1e-4, atol=1e-5)
    with pytest.raises(SamplingError, match="method 'hypernetwork' takes Sampling, not SamplingConfig"):
        generate_best(
            hypernetwork(),
            cond,
            layout_of(),
            network(),
            sampling=SamplingConfig(top_k=1),
            **settings,  # pyright: ignore[reportArgumentType]
        )


def test_settings_come_from_the_command_line_and_are_checked() -> None:
    def resolved(*overrides: str) -> object:
        return igpg().resolve_sampling(load_config(GenerateConfig, None, overrides).sampling)

    expected = SamplingConfig(top_k=5, chunks="independent")
    assert resolved("sampling.top_k=5", "sampling.chunks=independent") == expected
    for wrong, message in (
        ("decoding=mean", "give one of expected, tokens"),
        ("chunks=some", "give one of coherent, independent, shuffled"),
        ("windows=all", "give one of sequential, parallel"),
        ("top_p=0", r"top_p=0.0 in \(0, 1\]"),
        ("guidance=-1", "guidance=-1.0 must be at least 0"),
        ("overlap=1", r"overlap=1.0 in \[0, 1\)"),
        ("num_averaged=0", "num_averaged=0"),
        ("topk=5", r"unknown key 'topk' in sampling; did you mean 'top_k'"),
        ("top_k=some", "top_k"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolved(f"sampling.{wrong}")
