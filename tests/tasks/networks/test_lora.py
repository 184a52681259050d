from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from raywgen.tasks import (
    FitConfig,
    FitData,
    Recorded,
    TaskError,
    build_network,
    fit,
    network_name,
    repeat_state,
    stacked_logits,
)
from raywgen.tasks.networks import LoRANetwork
from raywgen.tasks.networks.lora import adapted_weight, merge
from raywgen.trust import trusting
from tests.tasks.networks.measures import num_parameters, without_gradient

MLP = {"name": "mlp", "widths": [12, 8, 6, 3]}
RESNET = {"name": "cifar-resnet", "depth": 8, "widths": [4, 6, 8], "num_classes": 3, "in_channels": 1}
VIT = {
    "name": "raywgen.tasks.networks:VisionTransformer",
    **{"width": 12, "num_layers": 2, "num_heads": 3, "num_classes": 3, "image_size": 8, "patch_size": 4},
    "in_channels": 1,
}
# Base, what is adapted and how, values of a sample.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "mlp": (MLP, {"rank": 2, "alpha": 6, "targets": [r"\d"]}, 12),
    "convolutions and head": (RESNET, {"rank": 3, "targets": ["layer3.*conv", "^linear"], "train_head": ["bias"]}, 64),
    "transformer": (VIT, {"rank": 4, "targets": ["qkv", "patch_embed"], "train_head": ["^head", "cls"]}, 64),
}


@pytest.fixture(autouse=True)
def _own_word() -> Iterator[None]:
    with trusting("raywgen.tasks.networks"):
        yield


each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    def recipe(case: str) -> dict[str, Any]:
        base, adapter, _ = CASES[case]
        return adapter_of(base, tmp_path) | adapter

    return recipe


def adapter_of(base: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe without rank and targets; the base's weights and running statistics are random, and saved."""
    torch.manual_seed(0)
    module = build_network(base)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor += torch.rand_like(tensor) if "running" in name else 0.1 * torch.randn_like(tensor)
    save_file(module.state_dict(), folder / "base.safetensors")
    return {"name": "lora", "base": base, "weights": str(folder / "base.safetensors")}


def base_of(recipe: dict[str, Any]) -> nn.Module:
    module = build_network(recipe["base"]).eval()
    module.load_state_dict(load_file(recipe["weights"]))
    return module


def frozen_of(module: nn.Module) -> nn.Module:
    assert isinstance(module, LoRANetwork)
    return module._frozen[0]


def perturbed(module: nn.Module, seed: int = 1) -> nn.Module:
    """As after some training: no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_it_starts_as_its_base(case: str, training: bool, recipe_of: Callable[[str], dict[str, Any]]) -> None:
    recipe = recipe_of(case)
    x = torch.randn(5, CASES[case][2])
    module, base = build_network(recipe).train(training), base_of(recipe)
    assert torch.equal(module(x), base(x))
    assert torch.equal(module(x), base(x)), "running statistics have moved"


def test_only_factors_and_the_head_are_its_own(recipe_of: Callable[[str], dict[str, Any]]) -> None:
    module = build_network(recipe_of("convolutions and head"))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "layer3.0.conv1.lora_A": (3, 54),
        "layer3.0.conv1.lora_B": (8, 3),
        "layer3.0.conv2.lora_A": (3, 72),
        "layer3.0.conv2.lora_B": (8, 3),
        "linear.lora_A": (3, 8),
        "linear.lora_B": (3, 3),
        "linear.bias": (3,),
        **{f"layer{i}.0.bn{j}.bias": ((4, 6, 8)[i - 1],) for i in (1, 2, 3) for j in (1, 2)},
        "bn1.bias": (4,),
    }
    assert {name for name, _ in module.named_parameters()} == shapes.keys()
    assert not list(module.buffers())


def test_the_root_itself_is_adapted() -> None:
    module = perturbed(LoRANetwork(nn.Linear(6, 4), 2, ["weight"]))
    assert list(module.state_dict()) == ["lora_A", "lora_B"]
    assert isinstance(module, LoRANetwork)
    assert list(merge(module)) == ["weight", "bias"]


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 2, 4)])
def test_an_adapted_weight_is_equation_3(shape: tuple[int, ...]) -> None:
    frozen = torch.randn(shape, dtype=torch.float64)
    a_RI = torch.randn(2, frozen[0].numel(), dtype=torch.float64)
    b_OR = torch.randn(5, 2, dtype=torch.float64)
    adapted = adapted_weight(frozen, a_RI, b_OR, 1.5)
    x = torch.randn(9, a_RI.shape[1], dtype=torch.float64)
    expected = x @ frozen.flatten(1).T + 1.5 * (x @ a_RI.T) @ b_OR.T
    torch.testing.assert_close(x @ adapted.flatten(1).T, expected)


def test_an_adapted_convolution_is_one_of_r_kernels_then_one_of_single_pixels() -> None:
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, dtype=torch.float64)
    module = perturbed(LoRANetwork(conv, 2, ["weight"], alpha=4))
    a_RI, b_OR = module.state_dict().values()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    low = F.conv2d(F.conv2d(x, a_RI.view(2, 3, 3, 3), stride=2, padding=1), b_OR.view(6, 2, 1, 1))
    torch.testing.assert_close(module(x), conv(x) + 2 * low)


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_a_stack_is_one_by_one(case: str, training: bool, recipe_of: Callable[[str], dict[str, Any]]) -> None:
    module = build_network(recipe_of(case)).train(training)
    x = torch.randn(4, CASES[case][2])
    networks = [perturbed(copy.deepcopy(module), seed) for seed in range(3)]
    stacked = {name: torch.stack([one.state_dict()[name] for one in networks]) for name in module.state_dict()}
    expected = torch.stack([one(x) for one in networks])
    torch.testing.assert_close(stacked_logits(module, stacked, x), expected, rtol=1e-4, atol=1e-4)


@each_case
def test_the_merged_base_gives_equal_logits(case: str, recipe_of: Callable[[str], dict[str, Any]]) -> None:
    recipe = recipe_of(case)
    x = torch.randn(5, CASES[case][2])
    module, base = perturbed(build_network(recipe)), base_of(recipe)
    assert isinstance(module, LoRANetwork)
    merged = merge(module)
    assert list(merged) == list(base.state_dict())
    before = base(x)
    base.load_state_dict(merged, strict=True)
    assert torch.equal(module(x), base(x))
    assert not torch.allclose(before, base(x), atol=1e-2)
    assert all(
        torch.equal(tensor, load_file(recipe["weights"])[name]) for name, tensor in base_of(recipe).state_dict().items()
    )


def test_a_tied_weight_changes_with_the_one_it_is_tied_to() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    base = nn.Sequential(first, second)
    module = perturbed(LoRANetwork(base, 1, ["weight"]))
    assert isinstance(module, LoRANetwork)
    merged, x = merge(module), torch.randn(3, 4)
    adapted = module(x)
    assert torch.equal(merged["0.weight"], merged["1.weight"])
    base.load_state_dict(merged)
    assert torch.equal(base(x), adapted)


@each_case
def test_gradients_reach_the_factors_alone(case: str, recipe_of: Callable[[str], dict[str, Any]]) -> None:
    module = build_network(recipe_of(case))
    x = torch.randn(8, CASES[case][2])
    # While B is zero, A has no gradient.
    assert all(name.endswith("lora_A") for name in without_gradient(module, x))
    module.zero_grad()
    assert without_gradient(perturbed(module), x) == []
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in frozen_of(module).parameters())


@pytest.mark.parametrize("case", ["mlp", "convolutions and head"])
def test_both_ways_of_fitting_agree(case: str, recipe_of: Callable[[str], dict[str, Any]]) -> None:
    recipe = recipe_of(case)
    x_SF = torch.randn(40, CASES[case][2])
    data = FitData(x=x_SF, labels_NS=torch.randint(3, (2, 40)))
    start = Recorded(step=0, state_N=repeat_state(build_network(recipe).state_dict(), 2))
    config = FitConfig(num_steps=6, batch_size=8, optimizer="sgd", learning_rate=0.05)
    (stack,), (alone,) = (
        fit(build_network(recipe), start, data, config, order_seeds=[3, 4], record_steps=[6], execution=execution)
        for execution in ("stacked", "sequential")
    )
    for name, tensor in stack.state_N.items():
        torch.testing.assert_close(tensor, alone.state_N[name], rtol=1e-3, atol=1e-5)
        assert not torch.equal(tensor[0], tensor[1])


def test_the_seed_decides_the_factors(recipe_of: Callable[[str], dict[str, Any]]) -> None:
    recipe, states = recipe_of("mlp"), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(build_network(recipe).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["0.lora_A"], states[2]["0.lora_A"])
    assert not any(tensor.any() for name, tensor in states[0].items() if name.endswith("lora_B"))


def test_copies_carry_the_base(recipe_of: Callable[[str], dict[str, Any]]) -> None:
    module = perturbed(build_network(recipe_of("convolutions and head")))
    x = torch.randn(4, 64)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert frozen_of(other) is not frozen_of(module)
    exact = copy.deepcopy(module).double()
    torch.testing.assert_close(exact(x.double()).float(), module(x), rtol=1e-4, atol=1e-4)
    assert all(tensor.is_meta for tensor in frozen_of(exact.to("meta")).parameters())
    assert not any(tensor.is_meta for tensor in frozen_of(module).parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks for a GPU")
def test_the_base_is_where_the_factors_are(recipe_of: Callable[[str], dict[str, Any]]) -> None:
    module = perturbed(build_network(recipe_of("convolutions and head")))
    x = torch.randn(4, 64)
    expected = module(x)
    state = {name: tensor.detach().cuda().unsqueeze(0) for name, tensor in module.state_dict().items()}
    with torch.inference_mode():
        torch.testing.assert_close(stacked_logits(module, state, x.cuda())[0].cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(module(x), expected)
    module.to("cuda")(x.cuda()).sum().backward()


def test_values_are_counted_without_memory(recipe_of: Callable[[str], dict[str, Any]]) -> None:
    assert num_parameters(recipe_of("mlp")) == 2 * (12 + 8 + 8 + 6 + 6 + 3)


def test_weights_of_any_kind_of_file_fill_the_base(tmp_path: Path) -> None:
    recipe = adapter_of(RESNET, tmp_path) | {"rank": 2, "targets": ["linear"]}
    expected, x = build_network(recipe), torch.randn(3, 64)
    # Older files hold no counters, wrappers put a prefix before every name.
    state = {f"module.{name}": t for name, t in load_file(recipe["weights"]).items() if "num_batches" not in name}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "base.th")
    assert torch.equal(build_network(recipe | {"weights": str(tmp_path / "base.th")})(x), expected(x))
    halves = {name: t.half() if t.is_floating_point() else t for name, t in load_file(recipe["weights"]).items()}
    save_file(halves, tmp_path / "half.safetensors")
    rounded = build_network(recipe | {"weights": str(tmp_path / "half.safetensors")})(x)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ["3.weigth"]},
            "targets: '3.weigth' is found in no tensor of the base; the nearest are .*4.weight",
        ),
        ({"targets": ["0.bias"]}, "targets: '0.bias' is found in no tensor of the base; the nearest are 0.weight"),
        ({"targets": ["0", "nine"]}, "targets: 'nine' is found in no tensor"),
        ({"targets": ["(0"]}, r"targets: '\(0' is no regular expression"),
        ({"targets": "0"}, r"targets=0: give a list, for instance \[0\]"),
        ({"targets": []}, "targets is empty; name the weights to adapt"),
        ({"train_head": ["head"]}, "train_head: 'head' is found in no tensor of the base; the nearest are"),
        ({"train_head": ["weight"]}, "'0.weight' is found by targets and by train_head; narrow one"),
        ({"rank": 4}, "rank=4: '4.weight' is 3 x 6; give at most 3, or leave it out of targets"),
        ({"rank": 0}, "rank=0: give a whole number of at least 1"),
        ({"alpha": 0}, "alpha=0: must be above 0"),
        ({"weights": "none.safetensors"}, "no weights of the base 'mlp-12-8-6-3': none.safetensors does not exist"),
        ({"base": MLP | {"widths": [12, 8, 5, 3]}}, r"base 'mlp-12-8-5-3': .*'2.weight' is float32\[6, 8\]"),
        ({"base": MLP | {"widths": [12, 3]}}, "base 'mlp-12-3': .*tensor '2.* is not in the layout"),
        ({"base": MLP | {"name": "mpl"}}, "unknown network 'mpl'"),
        ({"base": "mlp"}, "base=mlp: give the recipe of a network"),
        ({"ranks": 2}, "it takes base, rank, weights, targets, alpha, train_head"),
    ],
)
def test_wrong_recipes_say_what_to_give(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = adapter_of(MLP, tmp_path) | {"rank": 2, "targets": ["weight"]}
    with pytest.raises(TaskError, match=message):
        build_network(recipe | changes)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "base.pt").write_bytes(pickle.dumps(Path.cwd, protocol=2))
    recipe = {"name": "lora", "base": MLP, "weights": str(tmp_path / "base.pt"), "rank": 1, "targets": ["0"]}
    with pytest.raises(TaskError, match="never executed"):
        build_network(recipe)


def test_names_are_readable_and_tell_adapters_apart() -> None:
    base = {"name": "cifar-resnet", "depth": 20}
    recipe = {"name": "lora", "base": base, "weights": "/data/one.safetensors", "rank": 4, "targets": [r"conv\d"]}
    name = network_name(recipe)
    assert name.startswith("lora-cifar-resnet-20-rank_4-")
    assert name.replace("-", "").replace("_", "").isalnum()
    assert network_name(dict(reversed(list(recipe.items())))) == name
    others: list[dict[str, Any]] = [
        {"weights": "/data/two.safetensors"},
        {"targets": [r"conv[0-9]"]},
        {"targets": ["layer3", "linear"]},
        {"alpha": 8},
        {"train_head": ["bias"]},
        {"base": base | {"input_shape": [3, 32, 32]}},
    ]
    assert len({name, *(network_name(recipe | other) for other in others)}) == 1 + len(others)
