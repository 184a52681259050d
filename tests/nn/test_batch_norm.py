"""Running statistics after weights have changed: by hand, unmoved where nothing changed, and good for outputs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from raywgen.nn.batch_norm import (
    NotFiniteError,
    StatisticsError,
    differentiable,
    match_statistics,
    reestimate_statistics,
)
from raywgen.tasks import build_network
from raywgen.tasks.images import load_digits_images, normalise


def network() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5), nn.BatchNorm1d(5)
    )
    module.train()
    for _ in range(60):
        module(inputs(64) + 0.5)
    return module.eval()


def inputs(num: int = 40) -> Tensor:
    return torch.randn(num, 2, 6, 6, generator=torch.Generator().manual_seed(num))


def changed(module: nn.Sequential) -> nn.Sequential:
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5).add_(0.1)
    return other


def test_statistics_are_those_of_each_layer_s_inputs_by_hand() -> None:
    module, x = network(), inputs()
    found = reestimate_statistics(module, x)
    first = module[0](x).detach()
    torch.testing.assert_close(found["1.running_mean"], first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(found["1.running_var"], first.transpose(0, 1).flatten(1).var(dim=1))
    # The second layer's come after the first layer's have changed.
    other = copy.deepcopy(module)
    other.load_state_dict({**module.state_dict(), **{k: v for k, v in found.items() if k.startswith("1.")}})
    second = other[:5](x).detach()
    torch.testing.assert_close(found["5.running_mean"], second.mean(dim=0))
    torch.testing.assert_close(found["5.running_var"], second.var(dim=0))


def test_a_stream_of_one_batch_gives_the_same_bits() -> None:
    module, x = network(), inputs()
    whole, streamed = reestimate_statistics(module, x), reestimate_statistics(module, iter([x]))
    assert all(torch.equal(whole[name], streamed[name]) for name in whole)


def test_pooled_moments_of_the_first_layer_are_those_of_all_inputs_in_float64() -> None:
    module, x = network(), inputs(50) + torch.linspace(-3, 3, 50).view(-1, 1, 1, 1)  # Batches differ in mean.
    found = reestimate_statistics(module, x.split([20, 3, 25, 2]))
    first = copy.deepcopy(module[0]).double()(x.double()).detach()
    variance_D, mean_D = torch.var_mean(first, dim=(0, 2, 3))
    # Four batches in float32 are off by a few of its last bits.
    torch.testing.assert_close(found["1.running_mean"].double(), mean_D, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found["1.running_var"].double(), variance_D, rtol=2e-6, atol=0)


def test_batches_of_a_deep_network_come_close_to_one_large_batch() -> None:
    torch.manual_seed(0)
    module = build_network({"name": "cifar-resnet", "depth": 20, "widths": [8, 16, 32], "in_channels": 1})
    pixels = load_digits_images().x_SCHW[:640]
    x = normalise(pixels)[torch.randperm(640)]
    probe, outputs = x[512:], {}
    for size in (512, 64, 32):
        state = module.state_dict() | reestimate_statistics(module, x[:512].split(size))
        module.load_state_dict(state)
        with torch.no_grad():
            outputs[size] = module.eval()(probe)
    errors = {size: float((outputs[size] - outputs[512]).norm() / outputs[512].norm()) for size in (64, 32)}
    assert errors[64] < 0.03, errors
    assert errors[64] < errors[32] < 0.06, errors
    before = build_network({"name": "cifar-resnet", "depth": 20, "widths": [8, 16, 32], "in_channels": 1}).state_dict()
    module.load_state_dict({**module.state_dict(), **{k: v for k, v in before.items() if "running" in k}})
    with torch.no_grad():
        stored = module.eval()(probe)
    assert float((stored - outputs[512]).norm() / outputs[512].norm()) > 1, "the statistics before were as good"


def test_batches_are_not_kept_and_progress_counts_inputs() -> None:
    alive: list[weakref.ref[Tensor]] = []
    done: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number in range(6):
            assert sum(one() is not None for one in alive) <= 1
            x = inputs(8) + number
            alive.append(weakref.ref(x))
            yield x
            del x

    reestimate_statistics(network(), batches(), done.append)
    assert done == [8, 16, 24, 32, 40, 48]


def test_a_loader_of_pairs_is_taken_and_half_precision_is_measured_in_float32() -> None:
    module, x = network().bfloat16(), inputs(64).bfloat16()
    loader = DataLoader(TensorDataset(x, torch.zeros(64)), batch_size=16)
    found = reestimate_statistics(module, loader)
    first = module[0](x).detach().double()
    assert found["1.running_mean"].dtype == torch.bfloat16
    # Half of the last of the eight bits.
    torch.testing.assert_close(found["1.running_mean"].double(), first.mean(dim=(0, 2, 3)), rtol=2**-8, atol=1e-4)


def test_a_layer_that_does_not_run_gets_nothing_and_no_layer_needs_no_run() -> None:
    module = network()
    module.add_module("aside", nn.Identity())
    module.get_submodule("aside").add_module("unused", nn.BatchNorm1d(3))
    assert not any("unused" in name for name in reestimate_statistics(module, inputs()))
    assert reestimate_statistics(nn.Linear(2, 2), torch.zeros(1, 9)) == {}


def test_what_cannot_be_estimated_names_its_layer() -> None:
    module = network()
    with pytest.raises(StatisticsError, match="no batch of inputs"):
        reestimate_statistics(module, [])
    with pytest.raises(StatisticsError, match=r"layer .5.: a batch with a single value .* give larger"):
        reestimate_statistics(module, [inputs(4), inputs(1)])
    with torch.no_grad():
        module.get_parameter("4.weight")[0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="before layer '5' are NaN or infinite on inputs 0 to 39"):
        reestimate_statistics(module, inputs())


def test_the_modules_are_left_as_they_were() -> None:
    module, before = network(), copy.deepcopy(network().state_dict())
    reestimate_statistics(module, inputs())
    match_statistics(module, module, inputs())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_equal_weights_keep_their_statistics_on_any_inputs() -> None:
    module = network()
    found = match_statistics(module, copy.deepcopy(module), 9 * inputs(3))
    assert set(found) == {name for name in module.state_dict() if "running" in name}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, module.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_matched_statistics_undo_a_scale_and_shift_of_the_activations() -> None:
    module = network()
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.get_parameter("0.weight").mul_(3.0)
        other.get_parameter("0.bias").add_(2.0)
    assert not torch.allclose(other(inputs()), module(inputs()), atol=1e-2)
    other.load_state_dict({**other.state_dict(), **match_statistics(other, module, inputs(7))})
    torch.testing.assert_close(other(inputs()), module(inputs()), rtol=1e-3, atol=1e-3)


def test_a_constant_channel_keeps_its_variance_and_all_variances_stay_positive() -> None:
    module = network()
    found = match_statistics(changed(module), module, torch.zeros(4, 2, 6, 6))
    for name, tensor in found.items():
        assert bool(tensor.isfinite().all()), name
        if name.endswith("running_var"):
            assert float(tensor.min()) >= 0
    torch.testing.assert_close(found["1.running_var"], module.state_dict()["1.running_var"])


def test_given_statistics_normalise_as_in_eval_mode_and_get_gradients() -> None:
    module, x = network().double(), inputs().double()
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    for mode in (True, False):
        found = functional_call(differentiable(module, "stored").train(mode), state, (x,))
        torch.testing.assert_close(found, module.eval()(x))
    other = differentiable(module, "stored")
    for name in ("1.running_mean", "1.running_var", "5.running_mean", "5.running_var"):
        given = state[name].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda t, n=name: functional_call(other, {**state, n: t}, (x,)), given)


def test_batch_statistics_normalise_as_in_training_and_change_nothing() -> None:
    module, x = network(), inputs()
    before = copy.deepcopy(module.state_dict())
    expected = copy.deepcopy(module).train()(x)
    for mode in (True, False):
        torch.testing.assert_close(differentiable(module.train(mode), "batch")(x), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_module_without_batch_normalisation_is_left_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    assert all(differentiable(module, statistics) is module for statistics in ("stored", "batch"))
