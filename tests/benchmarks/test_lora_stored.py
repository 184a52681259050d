"""Adapters for new tasks from stored ones alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raywgen.benchmarks.lora_stored import combined, example_features, nearest, regression_weights
from raywgen.weights import Condition, Layout

LAYOUT = Layout.from_state_dict(
    {"query.lora_A": torch.zeros(2, 6), "query.lora_B": torch.zeros(5, 2), "head": torch.zeros(3)}
)


def stored(num: int = 8) -> Tensor:
    return torch.randn(num, LAYOUT.num_values, generator=torch.Generator().manual_seed(0))


def products(values_ND: Tensor) -> Tensor:
    state_N = LAYOUT.unflatten(values_ND)
    return state_N["query.lora_B"] @ state_N["query.lora_A"]


def test_products_are_summed_whatever_the_factors() -> None:
    values_ND = stored()
    one_hot_TN = torch.eye(len(values_ND))[[3, 5]]
    again_TD = combined(LAYOUT, values_ND, one_hot_TN)
    assert torch.allclose(products(again_TD), products(values_ND[[3, 5]]), atol=1e-5)
    assert torch.allclose(LAYOUT.unflatten(again_TD)["head"], LAYOUT.unflatten(values_ND[[3, 5]])["head"])
    # Factors turned into others of the same product change nothing.
    turned = LAYOUT.unflatten(values_ND)
    turn_RR = torch.tensor([[2.0, 1.0], [0.5, 3.0]])
    turned["query.lora_B"] = turned["query.lora_B"] @ turn_RR
    turned["query.lora_A"] = torch.linalg.inv(turn_RR) @ turned["query.lora_A"]
    turned_ND = torch.stack(
        [LAYOUT.flatten({name: tensor[n] for name, tensor in turned.items()}) for n in range(len(values_ND))]
    )
    weight_TN = torch.rand(4, len(values_ND), generator=torch.Generator().manual_seed(1))
    one, other = (products(combined(LAYOUT, each_ND, weight_TN)) for each_ND in (values_ND, turned_ND))
    assert torch.allclose(one, other, atol=1e-4)


def test_a_sum_is_the_best_of_its_rank() -> None:
    values_ND, weight_N = stored(), torch.full((8,), 1 / 8)
    mean_OI = products(values_ND).mean(dim=0)
    left_OK, size_K, right_KI = torch.linalg.svd(mean_OI, full_matrices=False)
    wanted_OI = left_OK[:, :2] * size_K[:2] @ right_KI[:2]
    assert torch.allclose(products(combined(LAYOUT, values_ND, weight_N.unsqueeze(0)))[0], wanted_OI, atol=1e-5)


@pytest.mark.parametrize(("strength", "nearness"), [(1e-6, "exact"), (1e6, "mean")])
def test_regression_goes_from_what_is_stored_to_its_mean(strength: float, nearness: str) -> None:
    features_NE = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    weight_TN = regression_weights(features_NE, features_NE, strength)
    wanted_TN = torch.eye(6) if nearness == "exact" else torch.full((6, 6), 1 / 6)
    assert torch.allclose(weight_TN, wanted_TN, atol=1e-3)
    assert nearest(features_NE[[4, 1]], features_NE).tolist() == [4, 1]


def test_features_of_examples_point_from_class_to_class() -> None:
    samples_1SF = torch.tensor([[[1.0, 0.0, 9.0], [3.0, 0.0, 9.0], [2.0, 4.0, -9.0], [2.0, 2.0, -9.0]]])
    condition = Condition(instructions=("",), samples_BSF=samples_1SF, labels_BS=torch.tensor([[0, 0, 1, 1]]))
    assert torch.allclose(example_features(condition, 2), torch.tensor([[0.0, 1.0]]))
