"""Gumbel-softmax quantisation: its limits in temperature, its KL in closed form, its gradients.

Shape legend: N vectors, K values, L tokens, V codes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raywgen.nn.quantisers import Annealing, GumbelQuantiser
from raywgen.nn.quantisers.gumbel import annealed_temperature, kl_to_uniform, straight_through_sample
from raywgen.nn.quantisers.kmeans import nearest_code
from raywgen.weights import KeyedNoise


def quantiser(width: int = 8) -> GumbelQuantiser:
    torch.manual_seed(0)
    return GumbelQuantiser(2, 6, width, Annealing(steps=10))


def vectors(num: int = 300, width: int = 8) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(1))


def noise(num: int, seed: int = 0) -> KeyedNoise:
    return KeyedNoise(seed, torch.arange(num))


def test_kl_to_uniform_in_closed_form() -> None:
    logits_NLV = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    half = torch.tensor([[[0.0, 0.0, -80.0, -80.0]]], dtype=torch.float64)
    assert kl_to_uniform(logits_NLV)[0].tolist() == pytest.approx([0.0, math.log(4)], abs=1e-12)
    assert float(kl_to_uniform(half)) == pytest.approx(math.log(2), abs=1e-12)


def test_samples_have_the_frequencies_of_the_softmax() -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0, 0.5])
    draws = 40_000
    one_hot = straight_through_sample(logits_V.expand(draws, 1, 4), noise(draws).gumbel(1, 4), 0.5)
    # A frequency's standard deviation is at most 0.5 / sqrt(40000) = 0.0025; the noise is fixed.
    torch.testing.assert_close(one_hot.mean(dim=(0, 1)), logits_V.softmax(0), rtol=0, atol=0.01)


def test_the_gradient_is_that_of_the_softmax_at_the_temperature() -> None:
    logits_NLV = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gumbel_NLV = noise(3).gumbel(2, 5)
    weight_NLV = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2))
    (straight_through_sample(logits_NLV, gumbel_NLV, 0.7) * weight_NLV).sum().backward()
    y = ((logits_NLV.detach() + gumbel_NLV) / 0.7).softmax(-1)
    expected = y * (weight_NLV - (y * weight_NLV).sum(-1, keepdim=True)) / 0.7
    assert logits_NLV.grad is not None
    torch.testing.assert_close(logits_NLV.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("temperature", "share"), [(1e-4, 0.0), (1e4, 1.0)])
def test_limits_in_temperature(temperature: float, share: float) -> None:
    # The softmax behind the gradient: one-hot in the cold, uniform in the heat, where its entropy is all of log V.
    logits_NLV, gumbel_NLV = vectors(50, 6).view(50, 1, 6), noise(50).gumbel(1, 6)
    y = ((logits_NLV + gumbel_NLV) / temperature).softmax(-1)
    entropy = -(y * y.clamp(min=1e-30).log()).sum(-1).mean() / math.log(6)
    assert float(entropy) == pytest.approx(share, abs=0.01)
    one_hot = straight_through_sample(logits_NLV, gumbel_NLV, temperature)
    assert torch.equal(one_hot.argmax(-1), (logits_NLV + gumbel_NLV).argmax(-1))
    assert torch.equal(one_hot.amax(-1), torch.ones(50, 1))


def test_temperature_falls_as_a_cosine_in_every_cycle() -> None:
    annealing = Annealing(start=1.0, end=0.1, steps=8, num_cycles=2)
    found = [annealed_temperature(annealing, step) for step in (0, 2, 4, 6, 8, 100)]
    assert found == pytest.approx([1.0, 0.55, 1.0, 0.55, 0.1, 0.1])


def test_updates_move_the_temperature_and_are_saved() -> None:
    gumbel, other = quantiser(), quantiser()
    for _ in range(5):
        gumbel.update(lambda tensor: tensor)
    assert gumbel.temperature == pytest.approx((1 + 1e-4) / 2)
    other.load_state_dict(gumbel.state_dict())
    assert other.temperature == gumbel.temperature


def test_initialised_it_is_vector_quantisation_of_the_parts() -> None:
    gumbel, vectors_NK = quantiser(), vectors()
    gumbel.initialise(vectors_NK, 8, torch.Generator().manual_seed(0))
    nearest = nearest_code(vectors_NK.view(-1, 4), gumbel.codebook_VJ.detach()).view(-1, 2)
    assert torch.equal(gumbel.encode(vectors_NK), nearest)
    q_NLV = gumbel.logits_of(vectors_NK.view(-1, 2, 4)).softmax(-1).detach()
    assert float(q_NLV.sum(-1).mean()) == pytest.approx(1.0, abs=1e-5)
    assert 0.3 < float(q_NLV.amax(-1).mean()) < 0.999  # A posterior, neither certain nor flat.


def test_evaluation_is_hard_and_takes_no_noise() -> None:
    gumbel = quantiser().eval()
    out = gumbel(vectors(20))
    assert torch.equal(out.codes_NL, gumbel.encode(vectors(20)))
    assert torch.equal(out.vectors_NK, gumbel.decode(out.codes_NL))


def test_training_samples_by_keyed_noise_and_reaches_all_parameters() -> None:
    gumbel, vectors_NK = quantiser().train(), vectors(40).requires_grad_()
    first = gumbel(vectors_NK, gumbel=noise(40).gumbel)
    again = gumbel(vectors_NK, gumbel=noise(40).gumbel)
    other = gumbel(vectors_NK, gumbel=noise(40, seed=1).gumbel)
    assert torch.equal(first.codes_NL, again.codes_NL)
    assert not torch.equal(first.codes_NL, other.codes_NL)
    (first.vectors_NK.square().sum() + first.loss).backward()
    for name, parameter in gumbel.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name
    assert vectors_NK.grad is not None


def test_padded_parts_have_no_say_in_the_loss() -> None:
    gumbel, vectors_NK = quantiser().eval(), vectors(10)
    mask_NK = torch.ones(10, 8)
    mask_NK[5:, 4:] = 0.0
    garbage_NK = torch.where(mask_NK > 0, vectors_NK, torch.tensor(1e3))
    assert torch.equal(gumbel(vectors_NK, mask_NK).loss, gumbel(garbage_NK, mask_NK).loss)
    parts = kl_to_uniform(gumbel.logits_of(vectors_NK.view(10, 2, 4)))
    expected = gumbel.kl_weight * torch.cat([parts[:5].flatten(), parts[5:, 0]]).mean()
    torch.testing.assert_close(gumbel(vectors_NK, mask_NK).loss, expected)
