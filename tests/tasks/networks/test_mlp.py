from __future__ import annotations

import torch

from raywgen.tasks.networks import mlp
from tests.tasks.networks.measures import num_parameters, without_gradient


def test_an_mlp_is_affine_maps_with_a_relu_between() -> None:
    module = mlp([5, 4, 3]).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    first_weight, first_bias, last_weight, last_bias = module.state_dict().values()
    expected = (x @ first_weight.T + first_bias).clamp(min=0) @ last_weight.T + last_bias
    torch.testing.assert_close(module(x), expected)


def test_values_and_gradients() -> None:
    assert num_parameters({"name": "mlp", "widths": [64, 14, 2]}) == 64 * 14 + 14 + 14 * 2 + 2
    assert without_gradient(mlp([8, 16, 3]), torch.randn(32, 8)) == []
