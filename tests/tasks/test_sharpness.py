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
