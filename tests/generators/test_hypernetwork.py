"""The plain hypernetwork behind the same interface."""

from __future__ import annotations

import pytest
import torch

from raywgen.generators import GenerationRequest
from raywgen.generators.igpg import SamplingConfig
from raywgen.generators.settings import SamplingError
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


def test_its_stage_lowers_the_loss() -> None:
    generator = hypernetwork()
    (stage,) = generator.stages()
    losses = train(stage, [weight_batch((SMALL, DEEP)[step % 2], 16, seed=step) for step in range(60)])
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_no_steps_switch_its_stage_off() -> None:
    assert hypernetwork(num_steps=0).stages() == []


def test_it_has_no_code_so_weights_stay_as_they_are() -> None:
    assert torch.equal(hypernetwork().reconstruct(values_of()[:2], layout_of()), values_of()[:2])
