"""The correction of layer normalisations for changed weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from raywgen.nn.layer_norm import match_layer_norms


class Two(nn.Module):
    """Two linear layers, each before a normalisation with drawn weights of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8))
        for name, parameter in self.named_parameters():
            if name.split(".")[1] in ("1", "4"):
                nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def case() -> tuple[Two, Two, Tensor, Tensor]:
    torch.manual_seed(0)
    original, x, is_real = Two(), torch.randn(40, 5, 6), torch.rand(40, 5) < 0.7
    return original, copy.deepcopy(original), x, is_real


def corrected(module: Two, original: Two, x: Tensor, is_real: Tensor) -> Two:
    module = copy.deepcopy(module)
    missing = module.load_state_dict(match_layer_norms(module, original, {"x": x}, is_real), strict=False)
    assert not missing.unexpected_keys
    return module


def test_changed_norms_alone_are_restored_and_nothing_else_changes() -> None:
    original, changed, x, is_real = case()
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if name.endswith(("1.weight", "4.weight")):
                parameter.mul_(3.0)
            elif name.endswith(("1.bias", "4.bias")):
                parameter.add_(1.0)
    before = copy.deepcopy(changed.state_dict())
    restored = corrected(changed, original, x, is_real)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(changed.state_dict()[name], before[name])


@torch.no_grad()
def test_outputs_have_the_originals_mean_and_deviation_in_every_channel_after_each_layer() -> None:
    original, changed, x, is_real = case()
    for layer in (changed.layers[0], changed.layers[3]):
        assert isinstance(layer, nn.Linear)
        layer.weight += 0.2 * torch.randn_like(layer.weight)
    after = corrected(changed, original, x, is_real)
    for end in (2, 5):
        wanted, got = original.layers[:end](x)[is_real], after.layers[:end](x)[is_real]
        assert not torch.allclose(got, wanted, atol=0.1)
        torch.testing.assert_close(got.mean(dim=0), wanted.mean(dim=0), rtol=0, atol=1e-5)
        torch.testing.assert_close(got.std(dim=0), wanted.std(dim=0), rtol=1e-4, atol=0)


@torch.no_grad()
def test_padding_does_not_count() -> None:
    original, changed, x, is_real = case()
    changed.layers[0].weight.mul_(-1.0)  # pyright: ignore[reportCallIssue]
    one = match_layer_norms(changed, original, {"x": x}, is_real)
    other = match_layer_norms(changed, original, {"x": torch.where(is_real.unsqueeze(-1), x, 100.0)}, is_real)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@torch.no_grad()
def test_a_constant_channel_keeps_its_weight_and_gets_the_originals_mean() -> None:
    original, changed, x, is_real = case()
    changed.layers[0].weight.zero_()  # pyright: ignore[reportCallIssue]
    found = match_layer_norms(changed, original, {"x": x}, is_real)
    assert torch.equal(found["layers.1.weight"], original.state_dict()["layers.1.weight"])
    wanted = original.layers[:2](x)[is_real].mean(dim=0)
    after = corrected(changed, original, x, is_real)
    torch.testing.assert_close(after.layers[:2](x)[is_real].mean(dim=0), wanted, rtol=0, atol=1e-5)
