"""Support sets followed through layers, beside the networks themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raywgen.generators.units.samples import MOST_SAMPLES, Activations
from raywgen.tasks import build_network


def test_facts_are_those_computed_by_hand() -> None:
    samples = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [1.0, 4.0], [3.0, 4.0]]])
    facts = Activations.of_samples(samples, torch.tensor([[0, 0, 1, 1]]), 3).facts()
    assert facts.mean_BX.tolist() == [[2.0, 2.0]]
    assert facts.variance_BX.tolist() == [[1.0, 4.0]]
    # Class means differ along the second input alone; the third class is absent.
    assert facts.class_BCX.tolist() == [[[0.0, -2.0], [0.0, 2.0], [0.0, 0.0]]]
    features = facts.features()
    assert features.shape == (1, 2, 2 + 2 * 3)
    # Class differences relative to their size over the inputs, then to each input's spread.
    assert torch.allclose(features[0, 1, 2:], torch.tensor([-(2**0.5), 2**0.5, 0.0, -1.0, 1.0, 0.0]), atol=0.03)


def test_of_many_samples_some_are_followed() -> None:
    labels_BS = torch.arange(200).expand(2, -1) // 100
    seen = Activations.of_samples(torch.randn(2, 200, 5), labels_BS, 2)
    assert seen.values_BSnP.shape == (2, MOST_SAMPLES, 5, 1)
    assert seen.member_BSC.sum(dim=1).tolist() == [[32.0, 32.0]] * 2


def weights_of(modules: list[nn.Module], name: str) -> Tensor:
    return torch.stack([module.get_parameter(name).detach() for module in modules])


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_what_the_layers_of_networks_make_of_the_samples(bias: bool) -> None:
    torch.manual_seed(0)
    samples_BSF, labels_BS = torch.rand(2, 12, 64), torch.arange(12).expand(2, -1) % 2
    given = Activations.of_samples(samples_BSF, labels_BS, 2)

    def built(recipe: dict[str, Any]) -> list[nn.Module]:
        return [build_network({**recipe, "bias": bias}) for _ in range(2)]

    def shift(modules: list[nn.Module], name: str) -> Tensor | None:
        return weights_of(modules, f"{name}.bias") if bias else None

    perceptrons = built({"name": "mlp", "widths": [64, 7, 5, 2]})
    hidden = given.through(weights_of(perceptrons, "0.weight"), None).rectified(shift(perceptrons, "0"))
    expected = torch.stack(
        [nn.Sequential(*list(net.children())[:2])(x) for net, x in zip(perceptrons, samples_BSF, strict=True)]
    )
    assert torch.allclose(hidden.values_BSnP.squeeze(-1), expected, atol=1e-5)

    cnns = built({"name": "cnn", "channels": [4, 6], "num_classes": 2})
    maps = given.as_maps(1)
    assert maps is not None
    convolved = maps.through(weights_of(cnns, "features.0.weight").flatten(2), (3, 3))
    pooled = convolved.rectified(shift(cnns, "features.0")).on_grid((4, 4))
    layers = [nn.Sequential(*list(net.get_submodule("features").children())[:3], nn.Flatten()) for net in cnns]
    images = samples_BSF.view(2, 12, 1, 8, 8)
    expected = torch.stack([layer(x) for layer, x in zip(layers, images, strict=True)])
    assert torch.allclose(pooled.values_BSnP.squeeze(-1), expected, atol=1e-5)
    halved = convolved.rectified(shift(cnns, "features.0")).pooled(2)
    convolved = halved.through(weights_of(cnns, "features.3.weight").flatten(2), (3, 3))
    last = convolved.rectified(shift(cnns, "features.3")).pooled(2).on_grid((2, 2))
    expected = torch.stack([net.get_submodule("features")(x) for net, x in zip(cnns, images, strict=True)])
    assert torch.allclose(last.values_BSnP.squeeze(-1), expected, atol=1e-5)


def test_values_that_are_no_square_maps_are_no_maps() -> None:
    flat = Activations.of_samples(torch.randn(1, 4, 12), torch.zeros(1, 4, dtype=torch.int64), 2)
    assert flat.as_maps(1) is None
    maps = flat.as_maps(3)
    assert maps is not None
    assert maps.grid == (2, 2)
