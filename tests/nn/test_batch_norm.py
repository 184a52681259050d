"""Running statistics after weights have changed: by hand, unmoved where nothing changed, and good for outputs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raywgen.nn.batch_norm import differentiable, match_statistics, reestimate_statistics


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
