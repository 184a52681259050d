from __future__ import annotations

import pytest
import torch

from raywgen.benchmarks.equal_accuracy import (
    Reached,
    averages,
    farthest_of,
    farthest_on_curve,
    nearest_distance,
    noise_curve,
    noisy,
    spread,
)
from raywgen.benchmarks.igpg_zoo import IGPGZooConfig, zoo_recipe
from raywgen.benchmarks.run import BENCHMARKS
from raywgen.benchmarks.zoo_ladder import LadderConfig
from raywgen.config import ConfigError, load_config
from raywgen.evaluation.novelty import distances
from raywgen.tasks import build_network
from raywgen.weights import Layout, Normalizer
from raywgen.weights.symmetry import find_symmetry

# Any reference will do that changes all places alike.
SCALE = 2.0


def normalizer(num_values: int, scale: float = SCALE) -> Normalizer:
    layout = Layout.from_state_dict({"weight": torch.zeros(num_values)})
    return Normalizer(layout, torch.tensor([3.0]), torch.tensor([scale]))


def percent(*pairs: tuple[float, float]) -> list[Reached]:
    return [Reached(distance=distance, accuracy=accuracy) for distance, accuracy in pairs]


def test_distances_are_root_mean_squares_in_units_of_the_scale() -> None:
    found_12 = distances(torch.zeros(1, 4), torch.tensor([[2.0, 2, 2, 2], [4.0, 0, 0, 0]]), normalizer(4))
    torch.testing.assert_close(found_12, torch.tensor([[1.0, 1.0]]))


def test_spread_is_the_mean_over_pairs() -> None:
    values_3D = torch.tensor([[0.0, 0.0], [2.0, 2.0], [6.0, 6.0]])
    assert spread(values_3D, normalizer(2)) == pytest.approx((1 + 3 + 2) / 3)
    assert spread(values_3D[:1], normalizer(2)) == 0


def test_accuracy_is_met_between_two_points_of_a_curve() -> None:
    curve = percent((0, 95), (0.2, 90), (0.4, 50))
    assert farthest_on_curve(90, curve) == pytest.approx(0.2)
    assert farthest_on_curve(70, curve) == pytest.approx(0.3)
    assert farthest_on_curve(40, curve) == pytest.approx(0.4)
    assert farthest_on_curve(96, curve) == 0


def test_of_a_curve_that_rises_again_the_last_crossing_counts() -> None:
    assert farthest_on_curve(80, percent((0, 90), (0.1, 70), (0.2, 85), (0.3, 75))) == pytest.approx(0.25)


def test_only_averages_that_are_accurate_enough_count() -> None:
    averaged = percent((0.1, 95), (0.5, 80), (0.9, 10))
    assert farthest_of(80, averaged) == 0.5
    assert farthest_of(81, averaged) == 0.1
    assert farthest_of(96, averaged) == 0


def test_noise_has_its_level_in_units_of_the_scale() -> None:
    copies_ND = torch.randn(8, 500, generator=torch.Generator().manual_seed(1))
    seen: list[float] = []

    def reached(values_ND: torch.Tensor) -> Reached:
        apart_N = distances(values_ND, copies_ND, normalizer(500)).diagonal()
        seen.append(float(apart_N.mean()))
        return Reached(accuracy=0, distance=0)

    noise_curve(copies_ND, [0.3, 0.1], normalizer(500), 0, reached)
    # 4,000 draws: the root mean square is within 4 of its standard errors, 1.1 % each. Levels come in order.
    assert seen == pytest.approx([0, 0.1, 0.3], rel=0.045, abs=1e-3)
    torch.testing.assert_close(
        noisy(copies_ND, 0.2, normalizer(500), 5) - copies_ND,
        2 * (noisy(copies_ND, 0.1, normalizer(500), 5) - copies_ND),
    )


def test_averages_are_of_different_networks_and_stay_within_a_group() -> None:
    stored_RD = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    of_two = averages(stored_RD, None, 2, 50, seed=0)
    assert of_two is not None
    sums = {a + b for a in (1, 2, 4, 8) for b in (1, 2, 4, 8) if a != b}
    assert {2 * value for value in of_two[:, 0].tolist()} <= sums
    within = averages(stored_RD, ["a", "b", "a", "b"], 2, 6, seed=0)
    assert within is not None
    assert within[:, 0].tolist() == [2.5, 5.0] * 3
    assert averages(stored_RD, ["a", "b", "a", "b"], 3, 6, seed=0) is None


def test_a_stored_network_in_another_order_is_no_new_one() -> None:
    torch.manual_seed(0)
    module = build_network({"name": "tiny-cnn"}).eval()
    layout, symmetry = Layout.from_state_dict(module.state_dict()), find_symmetry(module, torch.zeros(2, 784))
    stored_RD = torch.stack([layout.flatten(build_network({"name": "tiny-cnn"}).state_dict()) for _ in range(3)])
    orders = [torch.randperm(group.num_units) for group in symmetry.groups]
    moved_D = layout.flatten(symmetry.permute(layout.unflatten(stored_RD[1]), orders))
    units = normalizer(layout.num_values, 0.1)
    assert float(nearest_distance(moved_D[None], stored_RD, units, layout)) > 0.5
    # Not quite zero: `cdist` works with squares in float32.
    assert float(nearest_distance(moved_D[None], stored_RD, units, layout, symmetry)) < 1e-2


def test_recipes_are_the_shipped_ones_with_each_kind_of_start() -> None:
    assert BENCHMARKS["igpg-zoo"] == "raywgen.benchmarks.igpg_zoo"
    own = zoo_recipe(IGPGZooConfig(data="a", test_data="b"), "own", 4)
    assert (own.seeds_per_task, own.start, own.seed, own.tasks.path, own.tasks.test_path) == (100, "own", 4, "a", "b")
    rgb = IGPGZooConfig(recipe="tiny-cifar10", zoo=["seeds_per_task=7"])
    branched = zoo_recipe(rgb, "branched", 0)
    assert (branched.branch_steps, branched.seeds_per_task, branched.num_steps) == (200, 7, 2340)
    assert zoo_recipe(IGPGZooConfig(recipe="tiny-cifar10"), "shared", 0).seeds_per_task == 64


def test_zoos_of_several_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 architectures, 2 tasks"):
        zoo_recipe(IGPGZooConfig(zoo=["num_unseen_tasks=1"]), "own", 0)


@pytest.mark.parametrize("wrong", ["recipe=mnist", "seeds=0", "starts=[]", "starts=[own,own]", "starts=[one]"])
def test_wrong_settings_are_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        load_config(IGPGZooConfig, None, [wrong])


@pytest.mark.parametrize(
    "wrong",
    [{"num_networks": 0}, {"finetuned": 21}, {"noise_levels": [0.0]}, {"averaged": [1]}, {"finetune_epochs": []}],
)
def test_wrong_settings_of_the_ladder_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LadderConfig(**wrong)  # pyright: ignore[reportArgumentType]
