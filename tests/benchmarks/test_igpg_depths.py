"""Depths and widths never seen: networks brought to others by hand, choices, and the whole benchmark, small."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raywgen.benchmarks import igpg_depths
from raywgen.benchmarks.igpg_depths import IGPGDepthsConfig, zoo_recipe
from raywgen.benchmarks.resized_networks import StretchError, num_blocks, stretched, widened
from raywgen.benchmarks.run import run
from raywgen.benchmarks.size_ladder import SizeLadder, StoredSize, of_size, size_of
from raywgen.benchmarks.trained import trained_zoo
from raywgen.generation import load
from raywgen.nn.batch_norm import reestimate_statistics
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, build_network, build_task
from raywgen.weights import Layout

RECIPE = {"name": "cifar-resnet", "depth": 14, "widths": [2, 2, 4], "in_channels": 1}


def layout_of(depth: int) -> Layout:
    return Layout.from_state_dict(build_network(of_size(RECIPE, "depth", depth)).state_dict())


def network(depth: int, seed: int = 0) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return layout_of(depth).flatten(build_network(of_size(RECIPE, "depth", depth)).state_dict())


@torch.no_grad()
def logits(values_D: Tensor, depth: int, x_SF: Tensor) -> Tensor:
    module = build_network(of_size(RECIPE, "depth", depth)).eval()
    module.load_state_dict(layout_of(depth).unflatten(values_D, counters=module.state_dict()))
    return module(x_SF)


def marked(depth: int) -> Tensor:
    """Every value is the number of its block; outside of blocks it is 9."""
    layout = layout_of(depth)
    parts = [spec.name.split(".") for spec in layout.generated]
    marks = [float(name[1]) if name[0].startswith("layer") else 9.0 for name in parts]
    sizes = [spec.num_values for spec in layout.generated]
    return torch.cat([torch.full((size,), mark) for size, mark in zip(sizes, marks, strict=True)])


@pytest.mark.parametrize(
    ("depth", "wanted", "sources"),
    [
        (14, 26, [0, 1, 1, 1]),
        (20, 32, [0, 1, 1, 2, 2]),
        (32, 20, [0, 1, 3]),
        (26, 14, [0, 1]),
        (20, 8, [0]),
        (20, 20, [0, 1, 2]),
    ],
)
def test_blocks_are_repeated_and_left_out_evenly(depth: int, wanted: int, sources: list[int]) -> None:
    layout = layout_of(wanted)
    assert (num_blocks(layout_of(depth)), num_blocks(layout)) == ((depth - 2) // 6, len(sources))
    found = layout.unflatten(stretched(marked(depth)[None], layout_of(depth), layout)[0])
    for spec in layout.generated:
        stage, block, *_ = spec.name.split(".")
        expected = sources[int(block)] if stage.startswith("layer") else 9
        assert torch.equal(found[spec.name], torch.full(spec.shape, float(expected))), spec.name


def test_repeating_blocks_that_add_nothing_changes_no_output() -> None:
    layout, x_SF = layout_of(14), torch.rand(5, 64)
    state = layout.unflatten(network(14))
    for name in state:
        if ".1.bn2.weight" in name:
            state[name].zero_()
    values_D = layout.flatten(state)
    longer_D = stretched(values_D[None], layout, layout_of(26))[0]
    torch.testing.assert_close(logits(longer_D, 26, x_SF), logits(values_D, 14, x_SF))


def test_stages_of_one_block_cannot_be_stretched() -> None:
    with pytest.raises(StretchError, match="a single block"):
        stretched(network(8)[None], layout_of(8), layout_of(14))


def of_widths(seed: int, *widths: int) -> tuple[nn.Module, Layout]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build_network(RECIPE | {"widths": widths}).eval()
    return module, Layout.from_state_dict(module.state_dict())


@torch.no_grad()
def test_a_network_of_twice_the_width_computes_the_same() -> None:
    (module, layout), (double, wanted) = of_widths(0, 2, 4, 6), of_widths(1, 4, 8, 12)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    values_ND = layout.flatten(module.state_dict())[None]
    double.load_state_dict(wanted.unflatten(widened(values_ND, layout, wanted)[0], double.state_dict()))
    x_SF = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(double(x_SF), module(x_SF), rtol=1e-4, atol=1e-4)


def test_channels_are_repeated_and_left_out_evenly() -> None:
    (_, layout), (_, wider), (_, narrower) = of_widths(0, 4, 4, 4), of_widths(0, 6, 6, 6), of_widths(0, 3, 3, 3)
    state = {name: torch.zeros(tensor.shape) for name, tensor in of_widths(0, 4, 4, 4)[0].state_dict().items()}
    state["bn1.weight"] = torch.arange(4.0)
    state["layer1.0.conv1.weight"] = torch.arange(4.0).view(1, 4, 1, 1).expand(4, 4, 3, 3) + 1
    values_ND = layout.flatten(state)[None]
    found = wider.unflatten(widened(values_ND, layout, wider)[0])
    assert found["bn1.weight"].tolist() == [0, 0, 1, 2, 2, 3]
    assert found["layer1.0.conv1.weight"][5, :, 0, 0].tolist() == [0.5, 0.5, 2, 1.5, 1.5, 4]
    assert narrower.unflatten(widened(values_ND, layout, narrower)[0])["bn1.weight"].tolist() == [0, 1, 2]


def test_the_size_of_a_network_is_its_depth_or_the_width_of_its_first_stage() -> None:
    wider = of_size(RECIPE, "width", 6)
    assert wider == RECIPE | {"widths": [6, 6, 12]}
    assert (size_of(wider, "width"), size_of(wider, "depth")) == (6, 14)


def ladder(values_ND: Tensor, best_of: int = 2, num_chosen: int = 2) -> SizeLadder:
    task = build_task({"name": "images", "path": "digits"})
    settings: dict[str, Any] = {"num_condition_samples": 16, "num_unlabelled": 40, "seed": 0}
    stored = StoredSize(14, layout_of(14), values_ND)
    return SizeLadder(task, stored, RECIPE, "depth", best_of=best_of, num_chosen=num_chosen, **settings)


def test_of_every_n_the_lowest_loss_on_the_examples_is_chosen() -> None:
    values_4D = torch.stack([network(14, seed) for seed in range(4)])
    judged = ladder(values_4D)
    condition = judged.condition
    losses = [
        float(balanced_cross_entropy(logits(values_4D[n], 14, condition.samples_BSF[n])[None], condition.labels_BS[n]))
        for n in range(4)
    ]
    expected = [0 if losses[0] < losses[1] else 1, 2 if losses[2] < losses[3] else 3]
    assert torch.equal(judged.chosen(values_4D), values_4D[expected])
    # Candidates of one choice have the same samples; other choices have others.
    assert torch.equal(condition.samples_BSF[0], condition.samples_BSF[1])
    assert not torch.equal(condition.samples_BSF[1], condition.samples_BSF[2])


def test_networks_that_are_no_numbers_are_not_chosen() -> None:
    values_2D = torch.stack([torch.full_like(network(14), torch.nan), network(14)])
    assert torch.equal(ladder(values_2D, num_chosen=1).chosen(values_2D), values_2D[1:])


def test_points_are_the_mean_balanced_accuracy_on_test_samples() -> None:
    values_2D = torch.stack([network(14, 0), network(14, 1)])
    task = build_task({"name": "images", "path": "digits"})
    each = [balanced_accuracy(logits(one, 14, task.test_x_SF)[None], task.test_y_S) for one in values_2D]
    assert ladder(values_2D).percent(values_2D) == pytest.approx(100 * float(torch.cat(each).mean()), rel=1e-5)


def test_new_statistics_are_those_of_unlabelled_training_samples_and_nothing_else_changes() -> None:
    values_1D = network(14)[None]
    judged, layout = ladder(values_1D), layout_of(14)
    found = layout.unflatten(judged.with_new_statistics(values_1D)[0])
    before = layout.unflatten(values_1D[0])
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {spec.name for spec in layout.generated if "running" in spec.name}
    task = build_task({"name": "images", "path": "digits"})
    module = build_network(RECIPE)
    module.load_state_dict(layout.unflatten(values_1D[0], counters=module.state_dict()))
    order_S = torch.randperm(len(task.train_x_SF), generator=torch.Generator().manual_seed(0))
    by_hand = reestimate_statistics(module, task.train_x_SF[order_S[:40]])
    torch.testing.assert_close({name: found[name] for name in by_hand}, by_hand)


def test_diversity_is_in_units_of_the_originals_own() -> None:
    values_3D = torch.stack([network(14, seed) for seed in range(3)])
    judged = ladder(values_3D)
    assert judged.diversity(values_3D) == pytest.approx(1)
    assert judged.diversity(values_3D[:1].expand(3, -1)) == pytest.approx(0, abs=1e-3)


def test_the_zoo_is_the_shipped_one_without_its_untrained_checkpoints() -> None:
    zoo = zoo_recipe(IGPGDepthsConfig(data="a.parquet", zoo=["num_steps=500"]), 3)
    assert [network["depth"] for network in zoo.networks] == [8, 14, 26, 32]
    assert (zoo.seed, zoo.start, zoo.tasks.path, zoo.num_steps) == (3, "own", "a.parquet", 500)
    assert min(zoo.checkpoint_steps) > 0
    widths = IGPGDepthsConfig(varied="width")
    assert [network["widths"][0] for network in zoo_recipe(widths, 3).networks] == [4, 6, 12, 16]
    assert (widths.seen, widths.between, widths.beyond) == (12, 8, 20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seeds": 0},
        {"best_of": 0},
        {"seen": 20},
        {"between": 14},
        {"between": 44},
        {"beyond": 20},
        {"starts": [8, 44]},
        {"igpg_starts": [26]},
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IGPGDepthsConfig(**wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_the_benchmark_on_small_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Zoos of this process hold the same values as those of Ray, whose processes take seconds each to start.
    monkeypatch.setattr(igpg_depths, "ray_session", nullcontext)
    monkeypatch.setattr(igpg_depths, "trained_zoo", partial(trained_zoo, distributed=False))
    networks = ",".join(
        f"{{name: cifar-resnet, depth: {depth}, widths: [2, 2, 4], in_channels: 1}}" for depth in (8, 14, 26)
    )
    zoo = f"zoo=[seeds_per_task=2,num_steps=4,'checkpoint_steps=[2,4]','networks=[{networks}]']"
    igpg = ",".join(f"generator.{stage}.num_steps=2" for stage in ("tokenizer", "prior", "task_loss"))
    few = ["seen=14", "between=20", "beyond=32", "best_of=2", "num_chosen=1", "num_unlabelled=64"]
    short = ["hypernetwork.task_loss.num_steps=2", "units.task_loss.num_steps=2"]
    one = [*short, "finetune_rates=[0.01]", "igpg_starts=[38]", f"out={tmp_path}"]
    result = run(["igpg-depths", zoo, f"igpg=[{igpg}]", *few, *one])
    rows = {"original", "generated", "generated_stored", "token_prior", "hypernetwork", "units", "random"}
    rows |= {"finetuned_1", "random_finetuned_1"}
    nearest = {"stretched", "nearest", "average", "nearest_finetuned_1"}
    figures, conditions = result["figures"], result["conditions"]
    for kind, named in (("seen", rows), ("between", rows | nearest | {"cut"}), ("beyond", rows | nearest)):
        found = {name.removeprefix(f"{kind}_") for name in figures if name.startswith(kind)}
        assert found == named | {"diversity"}
        assert all(0 <= figures[f"{kind}_{name}"] <= 100 for name in named)
    assert figures["between_nearest"] == max(figures["between_stretched"], figures["between_cut"])
    assert conditions["trained_sizes"] == [8, 14, 26]
    (igpg,) = tmp_path.glob("igpg-*")
    assert sorted(layout.num_values for layout in load(str(igpg), device="cpu").generator.layouts)[-1] > max(
        conditions["values"].values()
    )
    assert set(conditions["values"]) == {8, 14, 20, 26, 32}
    assert conditions["published"] == {"resnet-110 on CIFAR-10": 46.0}
