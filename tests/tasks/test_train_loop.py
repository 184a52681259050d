from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from raywgen.config import merge_config
from raywgen.tasks import FitConfig, FitData, Inputs, Recorded, SAMConfig, build_network, fit, repeat_state
from raywgen.tasks.augment import augment
from raywgen.tasks.train_loop import Execution

# Legend: N networks, S samples, F features.

RECIPE = {"name": "mlp", "widths": [6, 5, 3]}
NUM_SAMPLES = 50


def problem(num: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = build_network(RECIPE)
    x_SF = torch.randn(NUM_SAMPLES, 6)
    labels_NS = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), num * NUM_SAMPLES, replacement=True).view(num, -1)
    return module, x_SF, labels_NS


def from_start(module: nn.Module, num: int) -> Recorded:
    return Recorded(step=0, state_N=repeat_state(module.state_dict(), num))


def plain_loop(module: nn.Module, x_SF: Tensor, labels_S: Tensor, seed: int, config: FitConfig) -> dict[str, Tensor]:
    """One network by torch's optimisers, class weights by scikit-learn's formula, SAM as its paper has it."""
    module = copy.deepcopy(module)
    rate, decay = config.learning_rate, config.weight_decay
    optimizer: torch.optim.Optimizer = {
        "adam": lambda: torch.optim.Adam(module.parameters(), lr=rate, weight_decay=decay),
        "adamw": lambda: torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=decay),
        "sgd": lambda: torch.optim.SGD(module.parameters(), lr=rate, weight_decay=decay, momentum=config.momentum),
    }[config.optimizer]()
    count_C = labels_S.bincount(minlength=3)
    weight_C = len(labels_S) / ((count_C > 0).sum() * count_C.clamp(min=1))
    if config.loss == "plain":
        weight_C = torch.ones(3)
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    for step in range(config.num_steps):
        if not batches:
            order_S = torch.randperm(len(labels_S), generator=generator)
            batches = [part for part in order_S.split(config.batch_size) if len(part) == config.batch_size]
        index_T = batches.pop(0)
        for group in optimizer.param_groups:
            shrink = 0.5 * (1 + math.cos(math.pi * step / config.num_steps))
            group["lr"] = rate * (shrink if config.schedule == "cosine" else 1)

        def backward(index_T: Tensor = index_T) -> None:
            loss_T = nn.functional.cross_entropy(module(x_SF[index_T]), labels_S[index_T], reduction="none")
            optimizer.zero_grad()
            (loss_T * weight_C[labels_S[index_T]]).mean().backward()

        backward()
        if config.sam.rho:
            buffers = [buffer.clone() for buffer in module.buffers()]
            kept = [parameter.detach().clone() for parameter in module.parameters()]
            with torch.no_grad():
                pairs = [(p, p.grad) for p in module.parameters() if p.grad is not None]
                size = [p.abs() if config.sam.adaptive else torch.ones_like(p) for p, _ in pairs]
                norm = torch.cat([(s * g).flatten() for s, (_, g) in zip(size, pairs, strict=True)]).norm()
                for s, (p, g) in zip(size, pairs, strict=True):
                    p += config.sam.rho * s * s * g / norm
            backward()
            with torch.no_grad():
                for parameter, before in zip(module.parameters(), kept, strict=True):
                    parameter.copy_(before)
                for buffer, before in zip(module.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        optimizer.step()
    return module.state_dict()


CONFIGS = {
    "adam": FitConfig(learning_rate=0.01),
    "adamw": FitConfig(optimizer="adamw", learning_rate=0.01, weight_decay=0.1, schedule="cosine"),
    "sgd": FitConfig(optimizer="sgd", learning_rate=0.05, loss="plain", weight_decay=0.01),
    "sam": FitConfig(learning_rate=0.01, sam=SAMConfig(rho=0.1)),
    "asam": FitConfig(optimizer="sgd", learning_rate=0.05, sam=SAMConfig(rho=0.5, adaptive=True)),
}


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_n_networks_are_as_many_single_loops(name: str, shared: bool, execution: Execution) -> None:
    module, x_SF, labels_NS = problem(3)
    x_NSF = torch.stack([x_SF, x_SF + 0.5, -x_SF])
    config = copy.copy(CONFIGS[name])
    config.num_steps, config.batch_size = 20, 16 if shared else NUM_SAMPLES
    seeds = [5, 6, 5]
    data = FitData(x=x_SF if shared else x_NSF, labels_NS=labels_NS)
    (end,) = fit(module, from_start(module, 3), data, config, order_seeds=seeds, record_steps=[20], execution=execution)
    for index, seed in enumerate(seeds):
        alone = plain_loop(module, x_SF if shared else x_NSF[index], labels_NS[index], seed, config)
        for key, tensor in alone.items():
            # Adam divides by the gradient's size, so rounding differences may grow to about 1e-4 of a step of 0.01.
            torch.testing.assert_close(end.state_N[key][index], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
@pytest.mark.parametrize("sharing", ["one part", "parts", "whole", "two data sets"])
def test_networks_learn_the_same_from_parts_as_from_copies(sharing: str, execution: Execution) -> None:
    module, x_SF, _ = problem(3)
    generator = torch.Generator().manual_seed(1)
    parts = [Inputs(x_SF, torch.randperm(NUM_SAMPLES, generator=generator)[:30]) for _ in range(3)]
    inputs = {
        "one part": parts[:1] * 3,
        "parts": parts,
        "whole": [Inputs(x_SF[:30])] * 3,
        "two data sets": [*parts[:2], Inputs(x_SF[20:].clone())],
    }[sharing]
    labels_NS = torch.randint(3, (3, 30), generator=generator)
    joined = FitData.joined(inputs, labels_NS)
    assert (joined.x is inputs[0].x_XF) == (sharing != "two data sets")
    copies = FitData(x=torch.stack([one[:] for one in inputs]), labels_NS=labels_NS)
    config = FitConfig(num_steps=9, batch_size=8, learning_rate=0.01)
    ends = [
        fit(module, from_start(module, 3), data, config, order_seeds=[1, 2, 3], record_steps=[9], execution=execution)[
            0
        ]
        for data in (joined, copies)
    ]
    assert all(torch.equal(tensor, ends[1].state_N[name]) for name, tensor in ends[0].state_N.items())


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_sam_leaves_running_statistics_to_the_first_pass(execution: Execution) -> None:
    torch.manual_seed(0)
    # A bias before the norm has no gradient but rounding, which Adam would blow up.
    module = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3))
    _, x_SF, labels_NS = problem(2)
    config = FitConfig(learning_rate=0.01, num_steps=7, batch_size=16, sam=SAMConfig(rho=0.3))
    (end,) = fit(
        module, from_start(module, 2), FitData(x=x_SF, labels_NS=labels_NS), config,
        order_seeds=[1, 2], record_steps=[7], execution=execution,
    )  # fmt: skip
    assert end.state_N["1.num_batches_tracked"].tolist() == [7, 7]
    for index, seed in enumerate([1, 2]):
        for key, tensor in plain_loop(module, x_SF, labels_NS[index], seed, config).items():
            torch.testing.assert_close(end.state_N[key][index], tensor, rtol=1e-4, atol=1e-5)


def test_a_network_with_convolutions_trains_the_same_by_both_executions() -> None:
    torch.manual_seed(0)
    module = build_network({"name": "tiny-cnn"})
    x_SF, labels_S = torch.rand(40, 784), torch.arange(40) % 10
    config = FitConfig(num_steps=20, batch_size=8, augment="flip+shift-2")
    ends = [
        fit(
            module, from_start(module, 2), FitData(x=x_SF, labels_NS=labels_S), config,
            order_seeds=[0, 9], record_steps=[20], execution=execution,
        )[0]
        for execution in ("stacked", "sequential")
    ]  # fmt: skip
    for key, tensor in ends[0].state_N.items():
        torch.testing.assert_close(ends[1].state_N[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_images_are_changed_by_their_networks_seed_and_step(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def noted(x: Tensor, kind: str, seed: int, step: int) -> Tensor:
        calls.append((seed, step))
        return augment(x, kind, seed, step)

    monkeypatch.setattr("raywgen.tasks.train_loop.augment", noted)
    module = build_network({"name": "mlp", "widths": [4, 2]})
    data = FitData(x=torch.rand(12, 4), labels_NS=torch.arange(12) % 2)
    config = FitConfig(num_steps=5, batch_size=4, augment="flip")
    fit(module, from_start(module, 2), data, config, order_seeds=[7, 9], record_steps=[5], execution=execution)
    assert sorted(calls) == [(seed, step) for seed in (7, 9) for step in range(1, 6)]


def test_records_the_asked_steps_in_the_asked_order() -> None:
    module, x_SF, labels_NS = problem(2)
    data = FitData(x=x_SF, labels_NS=labels_NS)
    config = FitConfig(learning_rate=0.01, batch_size=16, num_steps=6)
    start = from_start(module, 2)
    late, begin, early = fit(module, start, data, config, order_seeds=[1, 2], record_steps=[6, 0, 3])
    config.num_steps = 3
    (three,) = fit(module, start, data, config, order_seeds=[1, 2], record_steps=[3])
    assert [late.step, begin.step, early.step] == [6, 0, 3]
    for name, tensor in start.state_N.items():
        torch.testing.assert_close(begin.state_N[name], tensor, rtol=0, atol=0)
        torch.testing.assert_close(early.state_N[name], three.state_N[name], rtol=0, atol=0)
        assert not torch.equal(late.state_N[name], early.state_N[name])
        assert not late.state_N[name].requires_grad


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_goes_on_from_any_step_bit_for_bit(name: str, execution: Execution) -> None:
    module, x_SF, labels_NS = problem(2)
    config = copy.copy(CONFIGS[name])
    config.num_steps, config.batch_size = 12, 16
    data = FitData(x=x_SF, labels_NS=labels_NS)
    middle, end = fit(
        module, from_start(module, 2), data, config,
        order_seeds=[3, 4], record_steps=[7, 12], execution=execution, keep_optimizer=True,
    )  # fmt: skip
    (again,) = fit(
        module, middle, data, config, order_seeds=[3, 4], record_steps=[12], execution=execution, keep_optimizer=True
    )  # fmt: skip
    for found, wanted in ((again.state_N, end.state_N), (again.optimizer_N, end.optimizer_N)):
        assert found.keys() == wanted.keys()
        assert found
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_neither_the_start_nor_the_module_is_changed(execution: Execution) -> None:
    module, x_SF, labels_NS = problem(2)
    start = from_start(module, 2)
    before = [tensor.clone() for tensor in (*start.state_N.values(), *module.state_dict().values())]
    config = FitConfig(num_steps=2, batch_size=16, learning_rate=0.1)
    fit(
        module,
        start,
        FitData(x=x_SF, labels_NS=labels_NS),
        config,
        order_seeds=[0, 0],
        record_steps=[2],
        execution=execution,
    )
    for old, new in zip(before, (*start.state_N.values(), *module.state_dict().values()), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_a_class_that_is_missing_is_ignored() -> None:
    module, x_SF, _ = problem(1)
    labels_S = torch.full((NUM_SAMPLES,), 2)
    config = FitConfig(num_steps=3, batch_size=16, learning_rate=0.01)
    (end,) = fit(
        module, from_start(module, 1), FitData(x=x_SF, labels_NS=labels_S), config, order_seeds=[0], record_steps=[3]
    )
    assert all(bool(tensor.isfinite().all()) for tensor in end.state_N.values())


def test_wrong_settings_are_named() -> None:
    for settings, message in (
        ({"optimizer": "lion"}, "optimizer=lion: give one of adam, adamw, sgd"),
        ({"schedule": "step"}, "schedule=step: give one of"),
        ({"loss": "mse"}, "loss=mse"),
        ({"num_steps": 0}, "num_steps=0: must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be above 0"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_config(FitConfig, [("the settings", settings)])
    with pytest.raises(ValueError, match=r"sam\.rho=-1"):
        SAMConfig(rho=-1)
