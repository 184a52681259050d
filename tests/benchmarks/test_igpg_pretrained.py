"""The parts of `igpg-pretrained`: networks by path, a corpus of them, and what an IGPG trained on it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raywgen.benchmarks.igpg_pretrained import IGPGPretrainedConfig, chosen_networks
from raywgen.benchmarks.pretrained_networks import Images, Pretrained, PretrainedError, find_networks, percent
from raywgen.benchmarks.pretrained_written import Written, pretrained_corpus, written_again
from raywgen.benchmarks.trained import TrainingConfig, trained_generators
from raywgen.corpus import Corpus, verify_corpus
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPG, IGPGConfig, IGPGTaskLossConfig, PriorConfig, SamplingConfig
from raywgen.generators.settings import OptimizerConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.tasks.networks import CifarResNet, build_network
from raywgen.weights import save_state_dict

WIDTHS = (2, 4, 4)
TASK = {"name": "images", "path": "digits", "limit": 20}


def save(folder: Path, name: str, depth: int = 8, seed: int = 0, prefix: str = "") -> Mapping[str, Tensor]:
    torch.manual_seed(seed)
    state = CifarResNet(depth, widths=WIDTHS).state_dict()
    save_state_dict({prefix + key: value for key, value in state.items()}, folder / f"{name}.safetensors", {})
    return state


def images(num: int = 20) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(x_SCHW=torch.randn(num, 3, 32, 32, generator=generator), y_S=torch.arange(num) % 10)


def written(root: Path, network: Pretrained, corpus: Corpus, num_steps: int) -> Written:
    """By an IGPG trained for so long, or one kept from before."""
    igpg = IGPGConfig(
        tokenizer=TokenizerConfig(
            num_steps=1, batch_size=4, chunk_length=8, quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=8
        ),
        prior=PriorConfig(
            num_steps=num_steps,
            batch_size=8,
            width=32,
            num_layers=1,
            window=16,
            optimizer=OptimizerConfig(learning_rate=1e-2),
        ),
        task_loss=IGPGTaskLossConfig(num_steps=0),
    )
    config = TrainingConfig(num_workers=0)
    generator = trained_generators(config, str(root / "kept"), corpus, {"igpg": ("igpg", igpg)}, shot=0, seed=0)["igpg"]
    assert isinstance(generator, IGPG)
    return written_again(generator.eval(), corpus, network, SamplingConfig(decoding="tokens"), 0.0, seed=0)


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
        IGPGPretrainedConfig()
    with pytest.raises(ValueError, match="give data=PATH"):
        IGPGPretrainedConfig(dir=str(networks))
    (tmp_path / "cifar10-train.parquet").touch()
    (networks / "cifar10-test.parquet").touch()
    config = IGPGPretrainedConfig(dir=str(networks))
    assert config.data == str(tmp_path / "cifar10-train.parquet")
    assert config.test_data == str(networks / "cifar10-test.parquet")
    assert IGPGPretrainedConfig(dir=str(networks), data="mine", test_data="too").data == "mine"


def test_points_count_correct_images() -> None:
    class Third(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    assert percent(Third(), images(600)) == pytest.approx(10.0)


def test_networks_are_a_corpus_that_says_what_each_is(tmp_path: Path) -> None:
    states = {
        "a": save(tmp_path, "a", 8, prefix="module."),
        "b": save(tmp_path, "b", 20),
        "c": save(tmp_path, "c", 8, 1),
    }
    networks = find_networks(str(tmp_path))
    corpus = pretrained_corpus(str(tmp_path / "kept"), networks, TASK)
    assert not verify_corpus(corpus.location)
    assert "a, a ResNet of depth 8 with" in corpus.tasks["a"].instruction
    assert len({corpus.tasks[name].instruction for name in "abc"}) == 3
    for network in networks:
        rows = corpus.select(task_id=network.name)
        assert rows.column("layout_id").to_pylist() == [network.layout.id]
        assert torch.equal(corpus.values(rows)[0], network.layout.flatten(network.state))
        facts = corpus.networks[network.layout.id]
        module = build_network(facts.recipe)
        module.load_state_dict(states[network.name])
    assert pretrained_corpus(str(tmp_path / "kept"), networks, TASK).location == corpus.location
    save(tmp_path, "b", 20, seed=1)
    assert pretrained_corpus(str(tmp_path / "kept"), find_networks(str(tmp_path)), TASK).location != corpus.location


def test_a_network_is_learned_by_heart_and_written_without_being_seen(tmp_path: Path) -> None:
    save(tmp_path, "a")
    (network,) = find_networks(str(tmp_path))
    corpus = pretrained_corpus(str(tmp_path / "kept"), [network], TASK)
    before, after = (written(tmp_path, network, corpus, num_steps) for num_steps in (1, 300))
    # Two levels of 8 codes: a uniform guess costs log 8 = 2.08 nats.
    assert after.figures["generated_nats_per_token"] < before.figures["generated_nats_per_token"] - 1.5
    assert before.figures["generated_agreement"] < 0.5
    assert after.figures["generated_agreement"] == 1
    # So small a network is learned to the last token; what is written is then what the tokens hold.
    assert torch.equal(after.values_D, after.reconstructed_D)
    assert after.figures["generated_novelty"] < before.figures["generated_novelty"]
    other = replace(network, state={name: torch.zeros_like(value) for name, value in network.state.items()})
    assert torch.equal(written(tmp_path, other, corpus, 300).values_D, after.values_D)
