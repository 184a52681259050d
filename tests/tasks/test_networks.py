import pytest
import torch
from torch import nn

from raywgen.tasks import TaskError, build_network, network_name


def test_an_mlp_has_the_asked_widths_and_ends_in_logits() -> None:
    module = build_network({"name": "mlp", "widths": [64, 12, 8, 2]})
    shapes = [tuple(tensor.shape) for tensor in module.state_dict().values()]
    assert shapes == [(12, 64), (12,), (8, 12), (8,), (2, 8), (2,)]
    assert [type(part) for part in module.children()] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_a_start_is_fixed_by_the_seed() -> None:
    recipe = {"name": "mlp", "widths": [64, 14, 2]}
    torch.manual_seed(3)
    first = build_network(recipe).state_dict()
    torch.manual_seed(3)
    again = build_network(recipe).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_network_by_import_path() -> None:
    module = build_network({"name": "torch.nn:Linear", "in_features": 3, "out_features": 2})
    assert isinstance(module, nn.Linear)
    assert module.weight.shape == (2, 3)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "mpl", "widths": [2, 2]}, "unknown network 'mpl'; did you mean 'mlp'"),
        ({}, "unknown network ''"),
        ({"name": "mlp", "width": [2, 2]}, "does not take"),
        ({"name": "mlp", "widths": [2]}, "at least two positive widths"),
        ({"name": "torch.nn:NoSuchLayer"}, "cannot import network 'torch.nn:NoSuchLayer'"),
        ({"name": "no.such.package:Net"}, "cannot import network 'no.such.package:Net'"),
        ({"name": "pathlib:Path"}, "not an nn.Module"),
    ],
)
def test_recipes_that_build_nothing_say_why(recipe: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_network(recipe)


def test_names_say_the_architecture() -> None:
    assert network_name({"name": "mlp", "widths": [64, 14, 2]}) == "mlp-64-14-2"
    assert network_name({"name": "torch.nn:Linear", "in_features": 3, "out_features": 2}) == "Linear-3-2"
