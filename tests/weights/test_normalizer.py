"""Reference points: units, running variances, and what a layout without one is given."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raywgen.weights import (
    Layout,
    Normalizer,
    NormalizerTable,
    layout_normalizer,
    normalizer_of_similar,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def network(*widths: int) -> nn.Sequential:
    """Linear layers with batch normalisation between."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after)]
    return nn.Sequential(*layers)


def trained(num: int, *widths: int, seed: int = 0) -> tuple[Layout, Tensor]:
    """Networks with statistics as data leaves them, `(N, D)`."""
    rows = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(num):
            one = network(*widths)
            for layer in one:
                if isinstance(layer, nn.BatchNorm1d):
                    layer.running_var = torch.rand(layer.num_features) * 9 + 0.01
                    layer.running_mean = torch.randn(layer.num_features) + 5
            rows.append(Layout.from_state_dict(one.state_dict()).flatten(one.state_dict()))
        layout = Layout.from_state_dict(network(*widths).state_dict())
    return layout, torch.stack(rows)


@pytest.mark.parametrize("start", [False, True])
def test_there_and_back_is_the_same(start: bool) -> None:
    layout, values_ND = trained(6, 4, 5, 3)
    normalizer = Normalizer.measure(layout, values_ND, values_ND[0] if start else None)
    back_ND = normalizer.denormalise(normalizer.normalise(values_ND))
    torch.testing.assert_close(back_ND, values_ND, rtol=1e-5, atol=1e-5)


def test_each_tensor_has_unit_size_and_without_a_shared_start_no_mean() -> None:
    layout, values_ND = trained(8, 4, 5, 3)
    normalised_ND = Normalizer.measure(layout, values_ND, None).normalise(values_ND)
    for spec, part_NX in zip(
        layout.generated, normalised_ND.split([spec.num_values for spec in layout.generated], dim=1), strict=True
    ):
        assert float(part_NX.mean()) == pytest.approx(0.0, abs=1e-4), spec.name
        # Scales and shifts of an untrained normalisation are all equal.
        expected = 0.0 if spec.kind in ("norm_scale", "norm_shift") else 1.0
        assert float(part_NX.std(unbiased=False)) == pytest.approx(expected, abs=1e-4), spec.name


def test_about_a_shared_start_the_scale_is_that_of_what_is_left() -> None:
    layout, values_ND = trained(8, 4, 5, 3)
    normalizer = Normalizer.measure(layout, values_ND, 100 * values_ND[0])
    sizes = [spec.num_values for spec in layout.generated]
    for spec, part_NX in zip(layout.generated, normalizer.normalise(values_ND).split(sizes, dim=1), strict=True):
        if spec.kind in ("weight", "bias"):
            assert float(part_NX.std(unbiased=False)) == pytest.approx(1.0, abs=1e-3), spec.name


@given(seed=st.integers(0, 999), size=st.floats(0.1, 1e4))
@settings(max_examples=30)
def test_running_variances_stay_positive_whatever_is_written(seed: int, size: float) -> None:
    layout, values_ND = trained(4, 3, 4)
    normalizer = Normalizer.measure(layout, values_ND, None)
    written_BD = size * torch.randn(3, layout.num_values, generator=torch.Generator().manual_seed(seed))
    written_BD.requires_grad_()
    values_BD = normalizer.denormalise(written_BD)
    state = layout.unflatten(values_BD)
    assert bool((state["1.running_var"] > 0).all())
    assert bool(values_BD.isfinite().all())
    values_BD.sum().backward()
    assert written_BD.grad is not None
    assert bool(written_BD.grad.isfinite().all())


def test_a_dead_channel_has_a_finite_place() -> None:
    layout, values_ND = trained(4, 3, 4)
    values_ND[0, -4:] = 0.0
    assert bool(Normalizer.measure(layout, values_ND, None).normalise(values_ND).isfinite().all())


def known(*many: tuple[int, ...]) -> NormalizerTable:
    table = {}
    for widths in many:
        layout, values_ND = trained(5, *widths)
        table[layout.id] = (layout, Normalizer.measure(layout, values_ND, None))
    return table


def test_a_deeper_network_takes_each_tensor_from_the_one_most_like_it() -> None:
    table = known((6, 5, 5, 3))
    ((layout, normalizer),) = table.values()
    deeper = Layout.from_state_dict(network(6, 5, 5, 5, 3).state_dict())
    found = normalizer_of_similar(deeper, table, torch.randn(deeper.num_values))

    def parts(of: Layout, values_D: Tensor) -> dict[str, float]:
        sizes = [spec.num_values for spec in of.generated]
        return {spec.name: float(part[0]) for spec, part in zip(of.generated, values_D.split(sizes), strict=True)}

    scale, other = parts(deeper, found.scale_D), parts(layout, normalizer.scale_D)
    assert scale["0.weight"] == other["0.weight"]
    assert scale["2.weight"] == scale["4.weight"] == other["2.weight"]
    assert scale["6.weight"] == other["4.weight"]
    base, other = parts(deeper, found.base_D), parts(layout, normalizer.base_D)
    assert base["7.running_var"] == pytest.approx(other["5.running_var"], rel=1e-5)
    assert base["1.running_mean"] == pytest.approx(other["1.running_mean"], rel=1e-5)


def test_of_several_known_layouts_the_mean_counts() -> None:
    table = known((6, 5, 3), (6, 5, 5, 3))
    between = Layout.from_state_dict(network(6, 5, 4, 3).state_dict())
    found = normalizer_of_similar(between, table, torch.zeros(between.num_values))
    first = [float(normalizer.scale_D[0]) for _, normalizer in table.values()]
    assert float(found.scale_D[0]) == pytest.approx(sum(first) / 2)


def test_a_layout_that_has_no_such_tensor_has_no_say_in_its_scale() -> None:
    table = known((6, 5, 3), (9, 8, 7, 2))
    other = Layout.from_state_dict(network(6, 5, 5, 3).state_dict())
    found = normalizer_of_similar(other, table, torch.zeros(other.num_values))
    alike, _ = (normalizer for _, normalizer in table.values())
    assert float(found.scale_D[0]) == float(alike.scale_D[0])


def test_a_shared_start_is_replaced_by_the_new_networks_own_where_none_is_built_alike() -> None:
    layout, values_ND = trained(5, 6, 5, 3)
    table = {layout.id: (layout, Normalizer.measure(layout, values_ND, values_ND[0]))}
    deeper = Layout.from_state_dict(network(6, 5, 5, 3).state_dict())
    start_D = torch.rand(deeper.num_values) + 0.5
    assert torch.equal(normalizer_of_similar(deeper, table, start_D).base_D, start_D)


def test_a_shared_start_is_brought_to_other_widths() -> None:
    """What a generator writes is a difference from that start; on another one it is noise."""
    table: dict[str, tuple[Layout, Normalizer]] = {}
    for width in (4, 6):
        layout, values_ND = trained(5, 6, width, 3)
        table[layout.id] = (layout, Normalizer.measure(layout, values_ND, values_ND[0]))
    other = Layout.from_state_dict(network(6, 7, 3).state_dict())
    base = other.unflatten(normalizer_of_similar(other, table, torch.zeros(other.num_values)).base_D)
    layout, normalizer = table[Layout.from_state_dict(network(6, 6, 3).state_dict()).id]
    start = layout.unflatten(normalizer.base_D)
    # Six units on seven places: the fraction of the way decides, and the first and last stay where they are.
    places = [0, 1, 2, 3, 3, 4, 5]
    assert torch.equal(base["0.weight"], start["0.weight"][places])
    assert torch.equal(base["0.bias"], start["0.bias"][places])
    assert torch.equal(base["2.weight"], start["2.weight"][:, places])
    assert torch.equal(base["2.bias"], start["2.bias"])


def test_the_layouts_own_reference_knows_shapes_and_kinds_alone() -> None:
    module = nn.Sequential(nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64))
    nn.init.kaiming_normal_(module.get_parameter("0.weight"), nonlinearity="relu")
    layout = Layout.from_state_dict(module.state_dict())
    normalizer = layout_normalizer(layout)
    normalised = layout.unflatten(normalizer.normalise(layout.flatten(module.state_dict())))
    # He's initialisation has unit size; 2,304 draws give their deviation within 1.5 %, five times that is allowed.
    assert float(normalised["0.weight"].std()) == pytest.approx(1.0, rel=0.075)
    for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert bool((normalised[name] == 0).all()), name
    back_D = normalizer.denormalise(normalizer.normalise(layout.flatten(module.state_dict())))
    torch.testing.assert_close(back_D, layout.flatten(module.state_dict()), rtol=1e-5, atol=1e-6)


def test_the_layouts_own_reference_lies_about_a_start() -> None:
    layout, values_ND = trained(2, 4, 5, 3)
    normalizer = layout_normalizer(layout, values_ND[0])
    assert bool((normalizer.normalise(values_ND[0]) == 0).all())
    assert torch.equal(normalizer.scale_D, layout_normalizer(layout).scale_D)


def test_a_start_is_a_network_and_a_mean_is_none() -> None:
    layout, values_ND = trained(5, 6, 5, 3)
    assert Normalizer.measure(layout, values_ND, values_ND[0]).start_D is not None
    assert Normalizer.measure(layout, values_ND, None).start_D is None
    assert layout_normalizer(layout).start_D is None


@pytest.mark.parametrize("start", [False, True])
def test_a_part_is_normalised_as_it_is_within_the_whole(start: bool) -> None:
    layout, values_ND = trained(6, 4, 5, 3)
    normalizer = Normalizer.measure(layout, values_ND, values_ND[0] if start else None)
    position_NX = torch.tensor([0, 7, 3, 11, 20, 24]).unsqueeze(1) + torch.arange(12)
    part_NX, whole_ND = values_ND.gather(1, position_NX), normalizer.normalise(values_ND)
    assert torch.equal(normalizer.normalise(part_NX, position_NX), whole_ND.gather(1, position_NX))
    back_ND = normalizer.denormalise(whole_ND)
    assert torch.equal(
        normalizer.denormalise(whole_ND.gather(1, position_NX), position_NX), back_ND.gather(1, position_NX)
    )


def test_its_size_does_not_depend_on_that_of_the_network() -> None:
    sizes = []
    for width in (4, 400):
        layout, values_ND = trained(3, 6, width, 3)
        sizes.append(sum(tensor.numel() for tensor in Normalizer.measure(layout, values_ND, None).buffers()))
    assert sizes[0] == sizes[1]
