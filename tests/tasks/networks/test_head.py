from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from raywgen.tasks import TaskError, build_network, network_name
from tests.tasks.networks.measures import num_parameters


def test_a_head_is_a_linear_layer_that_starts_at_zero() -> None:
    module = build_network({"name": "head", "num_features": 6, "num_classes": 3})
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        "weight": (3, 6),
        "bias": (3,),
    }
    assert num_parameters({"name": "head", "num_features": 6, "num_classes": 3}) == 21
    assert network_name({"name": "head", "num_features": 6, "num_classes": 3}) == "head-6-3"
    x_SE = torch.randn(5, 6)
    assert torch.equal(module(x_SE), torch.zeros(5, 3))
    state = {"weight": torch.randn(3, 6), "bias": torch.randn(3)}
    module.load_state_dict(state)
    torch.testing.assert_close(module(x_SE), x_SE @ state["weight"].T + state["bias"])


def test_training_from_the_start_is_symmetric_in_the_classes() -> None:
    x_SE, y_S, order_C = torch.randn(12, 6), torch.randint(3, (12,)), torch.tensor([2, 0, 1])
    trained = []
    for labels_S in (y_S, order_C[y_S]):
        module = build_network({"name": "head", "num_features": 6, "num_classes": 3})
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(module(x_SE), labels_S).backward()
            optimizer.step()
        trained.append(module.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name][order_C], tensor)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(TaskError, match="num_features=0"):
        build_network({"name": "head", "num_features": 0, "num_classes": 3})
