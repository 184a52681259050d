"""The plain hypernetwork behind the same interface."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raywgen.generators import GenerationRequest
from raywgen.generators.common.task_loss import task_loss
from raywgen.generators.igpg import SamplingConfig
from raywgen.generators.settings import SamplingError
from raywgen.weights import Condition
from tests.builders import DEEP, SMALL, condition, hypernetwork, layout_of, noise_for, train, values_of, weight_batch


@pytest.mark.parametrize("widths", [SMALL, DEEP])
def test_same_network_for_the_same_condition(widths) -> None:
    generator, layout = hypernetwork(), layout_of(widths)
    first = generator.generate(
        GenerationRequest(condition=condition(3), layout=layout, noise=noise_for(3, 1), temperature=1.0)
    )
    second = generator.generate(
        GenerationRequest(condition=condition(3), layout=layout, noise=noise_for(3, 2), temperature=0.0)
    )
    assert first.values_BD.shape == (3, layout.num_values)
    assert torch.equal(first.values_BD, second.values_BD)
    assert first.log_prob_B is None
    other = generator.generate(GenerationRequest(condition=condition(3, seed=9), layout=layout, noise=noise_for(3)))
    assert not torch.equal(first.values_BD, other.values_BD)


def test_sampling_of_another_method_is_refused() -> None:
    foreign = SamplingConfig(top_k=1)
    request = GenerationRequest(condition=condition(1), layout=layout_of(), noise=noise_for(1), sampling=foreign)
    with pytest.raises(SamplingError, match="method 'hypernetwork' takes Sampling, not SamplingConfig"):
        hypernetwork().generate(request)


def test_it_can_begin_with_the_base_for_every_condition() -> None:
    generator, layout = hypernetwork(from_base=True), layout_of()
    request = GenerationRequest(condition=condition(2), layout=layout, noise=noise_for(2))
    base_D = generator.normalizer(layout).base_D
    assert torch.equal(generator.generate(request).values_BD, base_D.expand(2, -1))
    (stage,) = generator.stages()
    train(stage, [weight_batch(SMALL, 8, seed=step) for step in range(3)])
    assert not torch.equal(generator.generate(request).values_BD, base_D.expand(2, -1))


def test_what_is_left_out_is_not_read() -> None:
    generator, layout = hypernetwork(condition_dropout=0.5), layout_of()
    assert generator.reads_parts
    assert not hypernetwork().reads_parts
    one = condition(2)
    other = replace(condition(2, seed=9), instructions=one.instructions[::-1])
    mixed = replace(one, instructions=other.instructions)

    def written(given: Condition) -> Tensor:
        return generator.generate(GenerationRequest(condition=given, layout=layout, noise=noise_for(2))).values_BD

    assert not torch.equal(written(one), written(mixed))
    assert torch.equal(written(one.reading(instruction=False)), written(mixed.reading(instruction=False)))
    assert torch.equal(written(other.reading(samples=False)), written(mixed.reading(samples=False)))
    assert not torch.equal(written(one.reading(samples=False)), written(other.reading(samples=False)))


def test_parts_are_left_out_in_training_alone() -> None:
    generator = hypernetwork(condition_dropout=0.9)
    (stage,) = generator.stages()
    batch, noise = weight_batch(SMALL, 16), noise_for(16)
    stage.train()
    dropped = stage(batch, noise_for(16)).loss
    stage.eval()
    whole = stage(batch, noise).loss
    assert not torch.equal(dropped, whole)
    values_BD = generator.values(batch.condition, batch.layout, generator.normalizer(batch.layout))
    assert torch.allclose(whole, task_loss(values_BD, batch)[0].mean())


def test_its_stage_lowers_the_loss() -> None:
    generator = hypernetwork()
    (stage,) = generator.stages()
    losses = train(stage, [weight_batch((SMALL, DEEP)[step % 2], 16, seed=step) for step in range(60)])
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_no_steps_switch_its_stage_off() -> None:
    assert hypernetwork(num_steps=0).stages() == []


def test_it_has_no_code_so_weights_stay_as_they_are() -> None:
    assert torch.equal(hypernetwork().reconstruct(values_of()[:2], layout_of()), values_of()[:2])
