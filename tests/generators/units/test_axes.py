"""Layouts read as layers of units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raywgen.generators.units.axes import NUM_AXIS_FACTS, NUM_PLACE_FEATURES, place_features, unit_layout
from raywgen.tasks import build_network
from raywgen.weights import Layout


def layout_of(recipe: dict[str, Any]) -> Layout:
    return Layout.from_state_dict(build_network(recipe).state_dict())


def test_a_perceptron_is_a_chain_of_axes() -> None:
    units = unit_layout(layout_of({"name": "mlp", "widths": [64, 14, 8, 2]}))
    assert [axis.num_units for axis in units.axes] == [64, 14, 8, 2]
    assert [axis.depth for axis in units.axes] == [0, 1, 2, 3]
    assert [axis.has_bias for axis in units.axes] == [False, True, True, True]
    assert [(one.axis_in, one.axis_out) for one in units.tensors] == [
        (0, 1),
        (None, 1),
        (1, 2),
        (None, 2),
        (2, 3),
        (None, 3),
    ]
    assert units.output == 3
    assert units.facts().shape == (4, NUM_AXIS_FACTS)


def test_layers_of_equal_width_keep_their_own_biases() -> None:
    units = unit_layout(layout_of({"name": "mlp", "widths": [8, 8, 8, 8]}))
    assert [one.axis_out for one in units.tensors] == [1, 1, 2, 2, 3, 3]
    assert [one.axis_in for one in units.tensors] == [0, None, 1, None, 2, None]


def test_a_flattened_channel_has_several_places() -> None:
    units = unit_layout(layout_of({"name": "cnn", "channels": [6, 12], "num_classes": 3, "bias": False}))
    assert [axis.num_units for axis in units.axes] == [1, 6, 12, 3]
    assert [(one.grid, one.is_kernel) for one in units.tensors] == [((3, 3), True), ((3, 3), True), ((2, 2), False)]
    assert [axis.fan_in for axis in units.axes] == [1, 9, 54, 48]
    assert not any(axis.has_bias for axis in units.axes)


def test_normalised_layers_are_known() -> None:
    units = unit_layout(layout_of({"name": "cifar-resnet", "depth": 8, "widths": [4, 8, 16], "in_channels": 1}))
    norms = [one for one in units.tensors if one.spec.kind == "running_var"]
    assert [units.axes[one.axis_out].num_units for one in norms] == [4, 4, 4, 8, 8, 16, 16]
    assert all(units.axes[one.axis_out].has_norm for one in norms)
    # The convolution before each of them, and no other layer's.
    kernels = [one for one in units.tensors if one.is_kernel]
    assert [one.axis_out for one in kernels] == [one.axis_out for one in norms]
    assert not units.axes[units.output].has_norm


def test_a_shortcut_reads_the_axis_of_its_size() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Linear(5, 7), nn.Linear(7, 3)
            self.outer, self.shortcut = nn.Linear(3, 11), nn.Linear(7, 11)

    units = unit_layout(Layout.from_state_dict(Block().state_dict()))
    shortcut = next(one for one in units.tensors if one.spec.name == "shortcut.weight")
    assert shortcut.axis_in is not None
    assert units.axes[shortcut.axis_in].num_units == 7


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "vit-ti", "num_classes": 5, "image_size": 32},
        {"name": "conv4", "num_classes": 5, "width": 8},
        {"name": "resnet50", "num_classes": 4},
        {"name": "head", "num_features": 7, "num_classes": 3},
    ],
)
def test_every_value_of_any_layout_lies_along_axes(recipe: dict[str, Any]) -> None:
    with torch.device("meta"):
        layout = layout_of(recipe)
    units = unit_layout(layout)
    assert [one.spec for one in units.tensors] == list(layout.generated)
    for one in units.tensors:
        rows = units.axes[one.axis_out].num_units
        columns = 1 if one.axis_in is None else units.axes[one.axis_in].num_units * one.num_places
        assert rows * columns == one.spec.num_values


def test_places_differ_and_a_single_one_has_no_features() -> None:
    for grid in ((3, 3), (2, 2), (1, 5)):
        places = place_features(grid, is_kernel=True)
        assert places.shape == (grid[0] * grid[1], NUM_PLACE_FEATURES)
        assert len(torch.unique(places, dim=0)) == len(places)
    assert not place_features((1, 1), is_kernel=True).any()


@pytest.mark.parametrize(
    ("recipe", "factor"),
    [
        ({"name": "cnn", "channels": [3], "num_classes": 2}, 2),
        ({"name": "cnn", "channels": [3, 5], "num_classes": 2}, 2),
        ({"name": "cnn", "channels": [3, 5, 4], "num_classes": 2}, 2),
        ({"name": "mlp", "widths": [64, 9, 2]}, 1),
        ({"name": "cifar-resnet", "depth": 8, "widths": [4, 8, 16], "in_channels": 1}, 1),
    ],
)
def test_maps_are_pooled_as_often_as_the_columns_of_the_last_matrix_say(recipe: dict[str, Any], factor: int) -> None:
    assert unit_layout(layout_of(recipe)).pooling(64) == factor


@pytest.mark.parametrize(
    ("recipe", "is_followed"),
    [
        ({"name": "mlp", "widths": [64, 9, 2]}, True),
        ({"name": "cnn", "channels": [3, 5], "num_classes": 2}, True),
        ({"name": "mlp", "widths": [64, 4096, 2]}, False),  # Large.
        ({"name": "cifar-resnet", "depth": 8, "widths": [4, 8, 16], "in_channels": 1}, False),  # Normalised.
    ],
)
def test_samples_are_followed_through_small_chains(recipe: dict[str, Any], is_followed: bool) -> None:
    assert unit_layout(layout_of(recipe)).is_followed == is_followed
