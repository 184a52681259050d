"""Mc-Di behind the generator interface: noise, layouts, other numbers of classes, bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.generators import GenerationRequest
from raywgen.generators.bundle import build_generator, load_bundle, save_bundle
from raywgen.generators.mcdi import McDi, McDiConfig
from raywgen.generators.registry import METHODS
from raywgen.weights import Normalizer
from tests.builders import DEEP, NUM_FEATURES, SMALL, layout_of, noise_for, normalizers, part_of
from tests.generators.mcdi.builders import DATA, HEAD, config, head_batch, head_normalizers, mcdi, support_and_query

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLERS = ("mean", "stochastic", "deterministic")


TABLES = {"head": (HEAD,), "flat": (SMALL,), "chunks": (SMALL, DEEP)}
each_kind = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def with_sampler(sampler: str) -> McDi:
    return mcdi(config(sampling={"sampler": sampler}))


@pytest.mark.parametrize(("widths", "table"), [(widths, table) for table in TABLES.values() for widths in table])
def test_generates_every_known_layout(widths: tuple[int, ...], table: tuple[tuple[int, ...], ...]) -> None:
    generator, layout = mcdi(table=normalizers(*table)), layout_of(widths)
    written = generator.generate(
        GenerationRequest(condition=support_and_query(4, 3, seed=0)[0], layout=layout, noise=noise_for(4))
    )
    assert written.values_BD.shape == (4, layout.num_values)
    assert written.values_BD.dtype == torch.float32
    assert bool(written.values_BD.isfinite().all())
    assert written.log_prob_B is None
    assert not written.values_BD.requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_temperature_zero_is_deterministic_and_one_is_not(sampler: str) -> None:
    generator, layout, cond = with_sampler(sampler), layout_of(HEAD), support_and_query(3, 3, seed=0)[0]
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


@pytest.mark.parametrize("sampler", SAMPLERS)
@each_kind
def test_four_networks_at_once_are_two_and_two(sampler: str, table: tuple[tuple[int, ...], ...]) -> None:
    generator = mcdi(config(sampling={"sampler": sampler}), table=normalizers(*table))
    layout, cond = layout_of(table[0]), support_and_query(4, 3, seed=0)[0]
    together = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(4)))
    for part in (slice(0, 2), slice(2, 4)):
        alone = generator.generate(
            GenerationRequest(condition=part_of(cond, part), layout=layout, noise=noise_for(2, first=part.start))
        )
        # Matrix products of other batch sizes round differently.
        torch.testing.assert_close(alone.values_BD, together.values_BD[part], rtol=1e-4, atol=1e-5)


@each_kind
def test_the_support_set_reaches_the_weights(table: tuple[tuple[int, ...], ...]) -> None:
    generator, layout = mcdi(table=normalizers(*table)), layout_of(table[0])
    cond = [support_and_query(2, 3, seed)[0] for seed in (0, 1)]
    written = [
        generator.generate(GenerationRequest(condition=each, layout=layout, noise=noise_for(2))).values_BD
        for each in cond
    ]
    assert not torch.allclose(written[0], written[1], atol=1e-4)


def test_written_weights_are_in_units_of_the_reference() -> None:
    generator, layout, cond = mcdi(), layout_of(HEAD), support_and_query(3, 3, seed=0)[0]
    plain = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(3))).values_BD
    known = generator.normalizers[layout.id][1]
    other = Normalizer(layout, known.base_N, 2.0 * known.scale_N, known.base_D + 5.0)
    generator.normalizers[layout.id] = (layout, other)
    moved = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(3))).values_BD
    torch.testing.assert_close(moved, 2.0 * plain + 5.0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_a_head_with_other_classes_takes_the_scale_of_the_known_one(num_classes: int) -> None:
    generator, layout = mcdi(), layout_of((NUM_FEATURES, num_classes))
    assert generator.knows(layout)
    known = generator.normalizers[layout_of(HEAD).id][1]
    normalizer = generator.normalizer(layout)
    num_weights = num_classes * NUM_FEATURES
    scales = torch.cat([known.scale_D[:1].expand(num_weights), known.scale_D[-1:].expand(num_classes)])
    torch.testing.assert_close(normalizer.scale_D, scales, rtol=1e-6, atol=0)
    bases = torch.cat([known.base_D[:1].expand(num_weights), known.base_D[-1:].expand(num_classes)])
    torch.testing.assert_close(normalizer.base_D, bases, rtol=1e-5, atol=1e-7)
    cond = support_and_query(3, num_classes, seed=0)[0]
    written = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(3)))
    assert written.values_BD.shape == (3, layout.num_values)
    assert bool(written.values_BD.isfinite().all())


def test_the_known_layout_takes_its_own_reference() -> None:
    generator, layout = mcdi(), layout_of(HEAD)
    assert generator.normalizer(layout) is generator.normalizers[layout.id][1]


def test_other_unknown_layouts_need_a_normaliser() -> None:
    layout, cond = layout_of(DEEP), support_and_query(2, 2, seed=0)[0]
    generator = mcdi(config(network={"kind": "chunks"}), table=normalizers(SMALL))
    assert not generator.knows(layout)
    with pytest.raises(AssertionError, match="no normaliser"):
        generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(2)))
    num_tensors = len(layout.generated)
    given = Normalizer(layout, torch.full((num_tensors,), 7.0), torch.zeros(num_tensors))
    written = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(2), normalizer=given))
    assert torch.equal(written.values_BD, torch.full((2, layout.num_values), 7.0))


@pytest.mark.parametrize("kind", ["flat", "chunks"])
def test_only_a_denoiser_of_heads_knows_heads_with_other_classes(kind: str) -> None:
    generator = mcdi(config(network={"kind": kind}))
    assert generator.knows(layout_of(HEAD))
    assert not generator.knows(layout_of((NUM_FEATURES, 2)))
    assert not mcdi().knows(layout_of(SMALL))


@each_kind
def test_a_bundle_generates_bit_equal_networks(tmp_path: Path, table: tuple[tuple[int, ...], ...]) -> None:
    generator = mcdi(
        config(diffusion={"num_targets": 2}, sampling={"sampler": "stochastic"}), table=normalizers(*table)
    )
    cond, layout = support_and_query(3, 3, seed=0)[0], layout_of(table[0])
    generator.denoiser.setup([head_batch(4)], predicts_weights=True)
    save_bundle(generator, tmp_path, {"seed": 3})
    loaded = load_bundle(tmp_path)
    assert isinstance(loaded, McDi)
    assert loaded.config == generator.config
    assert loaded.needs.num_targets == 2
    before, after = (
        each.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(3)))
        for each in (generator, loaded)
    )
    assert torch.equal(before.values_BD, after.values_BD)


def test_the_registry_builds_it_from_its_own_config() -> None:
    assert METHODS["mcdi"].Config is McDiConfig
    generator = build_generator("mcdi", config(), head_normalizers(), DATA, seed=0)
    assert isinstance(generator, McDi)
    assert generator.needs.num_targets == 3


@pytest.mark.parametrize(
    ("on", "names"),
    [((True, True), ["denoiser", "task_loss"]), ((True, False), ["denoiser"]), ((False, True), ["task_loss"])],
)
def test_stages_are_in_order_and_switched_off_by_no_steps(on: tuple[bool, bool], names: list[str]) -> None:
    steps: list[dict[str, Any]] = [{"num_steps": int(is_on)} for is_on in on]
    generator = mcdi(config(denoiser=steps[0], task_loss=steps[1]))
    assert [stage.name for stage in generator.stages()] == names
    trained = {id(parameter) for parameter in generator.denoiser.parameters()}
    assert all({id(parameter) for parameter in stage.parameters()} == trained for stage in generator.stages())


def test_sampling_takes_as_many_steps_as_asked_for() -> None:
    settings = config(sampling={"num_steps": 2})
    generator = mcdi(settings)
    asked = []
    generator.denoiser.register_forward_pre_hook(lambda *_: asked.append("forward"))
    predict = generator.denoiser.predict

    def watched(*arguments: Any) -> torch.Tensor:
        asked.append(arguments[1].unique().tolist())
        return predict(*arguments)

    generator.denoiser.predict = watched  # pyright: ignore[reportAttributeAccessIssue]
    generator.generate(
        GenerationRequest(condition=support_and_query(3, 3, seed=0)[0], layout=layout_of(HEAD), noise=noise_for(3))
    )
    assert asked == [[0.0], [0.5]]
