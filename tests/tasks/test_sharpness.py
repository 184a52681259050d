from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from raywgen.tasks.sharpness import largest_eigenvalue


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_the_largest_eigenvalue_of_the_whole_hessian(seed: int) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()
    x_SF, labels_S = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    names = [name for name, _ in module.named_parameters()]
    shapes = [parameter.shape for parameter in module.parameters()]
    sizes = [parameter.numel() for parameter in module.parameters()]

    def loss(flat_D: torch.Tensor) -> torch.Tensor:
        parts = [part.view(shape) for part, shape in zip(flat_D.split(sizes), shapes, strict=True)]
        logits = functional_call(module, dict(zip(names, parts, strict=True)), (x_SF,))
        return nn.functional.cross_entropy(logits, labels_S)

    flat_D = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    hessian_DD = torch.autograd.functional.hessian(loss, flat_D)
    assert isinstance(hessian_DD, torch.Tensor)
    values = torch.linalg.eigvalsh(hessian_DD)
    found = largest_eigenvalue(module, x_SF, labels_S, num_iterations=300)
    assert found == pytest.approx(float(values[values.abs().argmax()]), rel=1e-4)


def test_a_flat_loss_has_none() -> None:
    module = nn.Linear(3, 1).eval()
    assert largest_eigenvalue(module, torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)) == 0.0


def test_where_the_loss_bends_down_most_it_is_negative() -> None:
    """At the top of `log(1 + exp(-w^2))` the second derivative is -1."""

    class Hill(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x_SF: torch.Tensor) -> torch.Tensor:
            height_S1 = self.w.square() * x_SF
            return torch.cat([height_S1, torch.zeros_like(height_S1)], dim=1)

    found = largest_eigenvalue(Hill().eval(), torch.ones(3, 1), torch.zeros(3, dtype=torch.int64))
    assert found == pytest.approx(-1.0)
