"""Generators that are pushed to the hub and loaded from there by their names."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import raywgen
from raywgen.generation.hub import HubError
from raywgen.generators.bundle import BundleError, build_generator, save_bundle
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.generators.interface import DataSpec
from raywgen.weights import Layout, layout_normalizer
from tests.generation.hub_server import TOKEN, Hub, hub_server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client talks to a server in this process, with a cache of its own."""
    with hub_server() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            server.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    state = torch.nn.Linear(4, 2).state_dict()
    layout = Layout.from_state_dict(state)
    normalizers = {layout.id: (layout, layout_normalizer(layout))}
    generator = build_generator(
        "hypernetwork", HypernetworkConfig(width=16), normalizers, DataSpec(num_features=4, max_classes=2), seed=0
    )
    save_bundle(generator, tmp_path / "mine", {"corpus": "/home/someone/secret/corpus", "seed": 3})
    return str(tmp_path / "mine")


def test_what_is_pushed_is_loaded_by_its_name(bundle: str, hub: Hub) -> None:
    generator = raywgen.load(bundle, device="cpu")
    url = generator.push_to_hub("owner/name", private=True, token=TOKEN, commit_message="First")
    assert url.startswith(f"{hub.address}/owner/name/commit/")
    assert "private" in str(hub.created[0])  # The client's versions say it by different keys.
    assert hub.commits[0]["summary"] == "First"
    assert hub.commits[0]["revision"] == "main"
    for name in ("owner/name", "hf://owner/name", "owner/name@main"):
        loaded = raywgen.load(name, device="cpu")
        assert repr(loaded) == repr(generator)
        expected = generator.generator.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.generator.state_dict().items())


def test_the_card_says_how_it_is_used_and_no_path_of_this_machine_is_sent(bundle: str, hub: Hub) -> None:
    raywgen.load(bundle, device="cpu").push_to_hub("owner/name", token=TOKEN, branch="trial")
    files = hub.files["owner/name"]
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: raywgen\n")
    assert "generator = raywgen.load('owner/name')" in card
    assert "- corpus: corpus" in card
    assert hub.branches == ["trial"]
    assert hub.commits[0]["revision"] == "trial"
    assert json.loads(files["generator.json"])["facts"]["corpus"] == "corpus"
    assert not any(b"someone" in content for content in files.values())


def test_a_folder_of_that_name_comes_before_the_hub(bundle: str, hub: Hub) -> None:
    raywgen.load(bundle, device="cpu").push_to_hub("owner/name", token=TOKEN)
    Path("owner/name").mkdir(parents=True)
    with pytest.raises(BundleError, match=r"^owner/name holds no trained generator"):
        raywgen.load("owner/name")
    Path("owner/name").rmdir()
    with pytest.raises(BundleError, match=r"^owner/name holds no trained generator"):
        raywgen.load("owner/name")  # The folder that it would lie in is here.
    assert raywgen.load("hf://owner/name", device="cpu").generator.method == "hypernetwork"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/none", r"^there is no folder owner/none here, and hf://owner/none cannot be fetched \([^\n]+$"),
        ("runs/igpg/none", "^runs/igpg/none holds no trained generator"),
    ],
)
def test_what_is_nowhere_is_one_line(name: str, said: str, hub: Hub) -> None:
    with pytest.raises(BundleError, match=said):
        raywgen.load(name)


def test_what_the_hub_refuses_is_one_line(bundle: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = raywgen.load(bundle, device="cpu")
    with pytest.raises(HubError, match=r"^owner/name cannot be pushed to the hub \([^\n]+HF_TOKEN may write$"):
        generator.push_to_hub("owner/name", token="hf_wrong")
    with pytest.raises(HubError, match="was not loaded from a folder"):
        raywgen.TrainedGenerator(generator.generator).push_to_hub("owner/name", token=TOKEN)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"needs huggingface_hub; install it by `pip install 'raywgen\[hub\]'`"):
        generator.push_to_hub("owner/name", token=TOKEN)
    with pytest.raises(BundleError, match=r"^there is no folder owner/name here, and hf://owner/name needs hugg"):
        raywgen.load("owner/name")


def test_it_moves_to_a_device_with_its_encoder(bundle: str) -> None:
    generator = raywgen.load(bundle, device="cpu")
    assert generator.to("meta") is generator
    assert generator.device.type == "meta"
    assert all(tensor.is_meta for tensor in generator.generator.state_dict().values())
