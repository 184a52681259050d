"""The arithmetic of `igpg-pretrained`: networks by path, tokens that know the layout alone, a blind prior."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raywgen.benchmarks.igpg_pretrained import Config, chosen_networks
from raywgen.benchmarks.pretrained_networks import Images, Pretrained, PretrainedError, find_networks, points
from raywgen.benchmarks.pretrained_prior import TokenPrior, TokenPriorConfig, rate_at
from raywgen.generators.igpg import PriorConfig
from raywgen.nn.quantisers import ResidualConfig
from raywgen.tasks.networks.cifar_resnet import CifarResNet
from raywgen.weights import save_state_dict

WIDTHS = (2, 4, 4)


def save(folder: Path, name: str, depth: int = 8, seed: int = 0, prefix: str = "") -> Mapping[str, Tensor]:
    torch.manual_seed(seed)
    state = CifarResNet(depth, widths=WIDTHS).state_dict()
    save_state_dict({prefix + key: value for key, value in state.items()}, folder / f"{name}.safetensors", {})
    return state


def images(num: int = 20) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(x_SCHW=torch.randn(num, 3, 32, 32, generator=generator), y_S=torch.arange(num) % 10)


def token_prior(networks: list[Pretrained], num_steps: int = 300) -> TokenPrior:
    tokens = ResidualConfig(num_levels=2, num_codes=8, beam=1)
    prior = PriorConfig(num_steps=num_steps, batch_size=8, width=32, num_layers=1, window=16, learning_rate=1e-2)
    return TokenPrior(TokenPriorConfig(chunk_length=8, tokens=tokens, prior=prior), networks, images(), seed=0)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_depth_and_widths_are_read_from_the_keys(tmp_path: Path, prefix: str) -> None:
    states = {"a": save(tmp_path, "a", 8, prefix=prefix), "b": save(tmp_path, "b", 20, prefix=prefix)}
    found = find_networks(str(tmp_path))
    assert [(network.name, network.depth) for network in found] == [("a", 8), ("b", 20)]
    for network in found:
        module = network.module()
        assert not module.training
        assert all(torch.equal(value, states[network.name][key]) for key, value in module.state_dict().items())


def test_what_is_no_such_network_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="no networks"):
        find_networks(str(tmp_path))
    save_state_dict(nn.Linear(2, 2).state_dict(), tmp_path / "linear.safetensors", {})
    with pytest.raises(PretrainedError, match=r"linear\.safetensors"):
        find_networks(str(tmp_path))
    state = dict(CifarResNet(8, widths=WIDTHS).state_dict())
    state["layer2.0.shortcut.weight"] = torch.zeros(4, 2, 1, 1)
    other = tmp_path / "other"
    save_state_dict(state, other / "projected.safetensors", {})
    with pytest.raises(PretrainedError, match="other tensors"):
        find_networks(str(other))


def test_the_last_network_is_held_out_unless_others_are_named(tmp_path: Path) -> None:
    save(tmp_path, "a")
    with pytest.raises(PretrainedError, match="heldout"):
        chosen_networks(str(tmp_path), "")
    for name in ("b", "c"):
        save(tmp_path, name)

    def names(heldout: str) -> list[list[str]]:
        return [[network.name for network in part] for part in chosen_networks(str(tmp_path), heldout)]

    assert names("") == [["a", "b"], ["c"]]
    assert names(str(tmp_path / "a.safetensors")) == [["b", "c"], ["a"]]
    with pytest.raises(PretrainedError, match="held out"):
        names(str(tmp_path))


def test_images_are_found_beside_the_networks_or_asked_for(tmp_path: Path) -> None:
    networks = tmp_path / "networks"
    networks.mkdir()
    with pytest.raises(ValueError, match="dir=PATH"):
        Config()
    with pytest.raises(ValueError, match="give data=PATH"):
        Config(dir=str(networks))
    (tmp_path / "cifar10-train.parquet").touch()
    (networks / "cifar10-test.parquet").touch()
    config = Config(dir=str(networks))
    assert config.data == str(tmp_path / "cifar10-train.parquet")
    assert config.test_data == str(networks / "cifar10-test.parquet")
    assert Config(dir=str(networks), data="mine", test_data="too").data == "mine"


def test_points_count_correct_images() -> None:
    class Third(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    assert points(Third(), images(600)) == pytest.approx(10.0)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    rates = [rate_at(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) < 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_a_prior_learns_tokens_and_writes_without_seeing_them(tmp_path: Path) -> None:
    save(tmp_path, "a")
    networks = find_networks(str(tmp_path))
    made = token_prior(networks)
    before = made.write(networks[0])
    assert made.train_or_load(str(tmp_path / "kept"), lambda done, total: None)
    after = made.write(networks[0])
    # Two levels of 8 codes: a uniform guess costs log 8 = 2.08 nats.
    assert after.nats_per_token < before.nats_per_token - 1.5
    assert before.agreement < 0.5
    # So small a network is learned by heart; what is written is then what the tokens hold.
    assert after.agreement == 1
    assert torch.equal(after.values_D, made.reconstruct(networks[0]))
    assert after.distance == made.distance(networks[0], made.reconstruct(networks[0])) < before.distance
    kept = token_prior(networks)
    assert not kept.train_or_load(str(tmp_path / "kept"), lambda done, total: None)
    kept._codes = {name: torch.zeros_like(codes_ML) for name, codes_ML in kept._codes.items()}
    assert torch.equal(kept.write(networks[0]).values_D, after.values_D)
