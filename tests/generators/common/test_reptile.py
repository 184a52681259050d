"""Reptile against plain loops over deep copies.

Shape legend: B items of a meta-batch, S samples, F features.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from raywgen.generators.common.reptile import adapt, pseudo_gradient_loss

pytestmark = pytest.mark.usefixtures("one_thread")

B, S, F, RATE = 6, 5, 4, 0.05


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(F, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 2)).double()


def steps_of(num_steps: int) -> list[tuple[Tensor, Tensor]]:
    """Other samples in every step, inputs `(B, S, F)` and targets `(B, S, 2)`."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(B, S, F, generator=generator, dtype=torch.float64),
            torch.randn(B, S, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(num_steps)
    ]


def loss_of(module: nn.Module, x_SF: Tensor, y_S2: Tensor) -> Tensor:
    return (module(x_SF) - y_S2).square().mean()


def adapted_by(module: nn.Module, steps: list[tuple[Tensor, Tensor]], rate: float = RATE) -> tuple[dict, Tensor]:
    def loss(own: dict[str, Tensor], x_SF: Tensor, y_S2: Tensor) -> Tensor:
        return (functional_call(module, own, (x_SF,)) - y_S2).square().mean()

    parameters = dict(module.named_parameters())
    adapted, first_loss_B = adapt(parameters, loss, steps, rate)
    return dict(adapted), first_loss_B


def loops(module: nn.Module, steps: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
    """phi_i, each by torch's own descent."""
    copies = []
    for b in range(len(steps[0][0])):
        own = copy.deepcopy(module)
        descent = torch.optim.SGD(own.parameters(), lr=RATE)
        for x_BSF, y_BS2 in steps:
            descent.zero_grad()
            loss_of(own, x_BSF[b], y_BS2[b]).backward()
            descent.step()
        copies.append(own)
    return copies


@pytest.mark.parametrize("num_steps", [1, 3])
def test_adapting_is_a_loop_of_descent_for_each_item(num_steps: int) -> None:
    module, steps = network(), steps_of(num_steps)
    adapted, first_loss_B = adapted_by(module, steps)
    for b, own in enumerate(loops(module, steps)):
        for name, parameter in own.named_parameters():
            # Float64 sums in another order.
            torch.testing.assert_close(adapted[name][b], parameter.detach(), rtol=1e-10, atol=1e-12)
        expected = loss_of(module, steps[0][0][b], steps[0][1][b]).detach()
        torch.testing.assert_close(first_loss_B[b], expected, rtol=1e-12, atol=0)


def test_adapting_leaves_the_parameters_and_their_gradients_alone() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    adapted, first_loss_B = adapted_by(module, steps_of(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not first_loss_B.requires_grad
    assert not any(tensor.requires_grad for tensor in adapted.values())


def test_float32_adapting_is_within_a_millionth() -> None:
    module = network().float()
    steps = [(x.float(), y.float()) for x, y in steps_of(3)]
    adapted, _ = adapted_by(module, steps)
    for b, own in enumerate(loops(module, steps)):
        for name, parameter in own.named_parameters():
            torch.testing.assert_close(adapted[name][b], parameter.detach(), rtol=1e-6, atol=1e-6)


def test_the_gradient_of_the_loss_is_the_mean_difference() -> None:
    module = network()
    parameters = dict(module.named_parameters())
    adapted, _ = adapted_by(module, steps_of(3))
    loss = pseudo_gradient_loss(parameters, adapted)
    assert loss.shape == ()
    loss.backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, parameter.detach() - adapted[name].mean(dim=0))
        assert float(parameter.grad.abs().max()) > 0


def test_a_step_of_descent_on_it_is_the_outer_update_of_reptile() -> None:
    module, steps, zeta = network(), steps_of(3), 0.7
    expected = {
        name: parameter.detach()
        + zeta
        / B
        * sum(dict(own.named_parameters())[name].detach() - parameter.detach() for own in loops(module, steps))
        for name, parameter in module.named_parameters()
    }
    adapted, _ = adapted_by(module, steps)
    pseudo_gradient_loss(dict(module.named_parameters()), adapted).backward()
    torch.optim.SGD(module.parameters(), lr=zeta).step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-10, atol=1e-12)


def test_two_halves_of_a_meta_batch_average_to_the_whole() -> None:
    def gradient(part: slice) -> dict[str, Tensor]:
        module = network()
        adapted, _ = adapted_by(module, [(x[part], y[part]) for x, y in steps_of(3)])
        parameters = dict(module.named_parameters())
        pseudo_gradient_loss(parameters, adapted).backward()
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}

    whole, first, second = (gradient(part) for part in (slice(None), slice(0, B // 2), slice(B // 2, B)))
    assert len(whole) == 6
    for name, expected in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, expected, rtol=1e-10, atol=1e-14)
        assert not torch.allclose(first[name], second[name], rtol=1e-3)
