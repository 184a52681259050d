"""Networks are named by folder or file where these say more than a hash, and describe takes these names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.tasks import build_network
from raywgen.zoo.describe import describe_corpus


def build(tmp_path: Path, files: dict[str, int], facts: str = "", folder: str = "in") -> Corpus:
    """A corpus of files by name, each with the width that makes its layout."""
    for index, (name, width) in enumerate(files.items()):
        path = tmp_path / folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.full((width, 2), float(index))}, path)
    (tmp_path / "facts.csv").write_text(facts)
    config = BuildConfig(out=str(tmp_path / "c"), sources=[str(tmp_path / folder)], distributed=False)
    config.facts = str(tmp_path / "facts.csv") if facts else ""
    return build_corpus(config)


def names(corpus: Corpus) -> dict[int, str]:
    return {network.layout.num_values // 2: network.name for network in corpus.networks.values()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"resnet20/0": 3, "resnet20/1": 3, "vgg/0": 4}, {3: "resnet20", 4: "vgg"}),
        ({"resnet20_seed0": 3, "resnet20_seed1": 3, "mlp0": 4, "mlp1": 4}, {3: "resnet20", 4: "mlp"}),
        ({"cifar/resnet_epoch1": 3, "cifar/resnet_epoch2": 3, "cifar/vgg_best": 4}, {3: "resnet", 4: "vgg"}),
        ({"bert-tiny/checkpoint-500/model": 3, "bert-tiny/checkpoint-900/model": 3}, {3: "bert-tiny"}),
        ({"0003_acc0.94_seed0001_cifar10": 3, "0004_acc0.95_seed0001_cifar10": 3}, {3: "cifar10"}),
        ({"run1/epoch_0": 3, "run1/epoch_1": 3}, {}),
        ({"net0": 3, "model": 3, "7": 3}, {}),
    ],
)
def test_networks_are_named_by_what_says_more_than_a_hash(
    tmp_path: Path, files: dict[str, int], expected: dict[int, str]
) -> None:
    found = names(build(tmp_path, files))
    assert {width: name for width, name in found.items() if not name.startswith("layout-")} == expected


def test_the_folder_that_was_given_names_what_is_in_it(tmp_path: Path) -> None:
    assert names(build(tmp_path, {"0": 3, "1": 3}, folder="resnet20")) == {3: "resnet20"}


def test_two_layouts_of_one_name_stay_apart(tmp_path: Path) -> None:
    found = sorted(names(build(tmp_path, {"mixed/0": 3, "mixed/1": 4})).values())
    assert len(set(found)) == 2
    assert all(name.startswith("mixed") for name in found)


def test_the_fact_architecture_comes_first(tmp_path: Path) -> None:
    assert names(build(tmp_path, {"mixed/0": 3}, "path,architecture\nmixed/0,mine\n")) == {3: "mine"}


@pytest.fixture
def mlps(tmp_path: Path) -> Corpus:
    for name, width in (("narrow", 3), ("wide", 5)):
        (tmp_path / "in" / name).mkdir(parents=True)
        state = build_network({"name": "mlp", "widths": [64, width, 2]}).state_dict()
        save_file(state, tmp_path / "in" / name / "0.safetensors")
    return build_corpus(BuildConfig(out=str(tmp_path / "c"), sources=[str(tmp_path / "in")], distributed=False))


@pytest.mark.parametrize("form", ["{name}", "{id}", "layout-{short}"])
def test_describe_takes_names_and_ids(mlps: Corpus, tmp_path: Path, form: str) -> None:
    networks = {}
    for layout_id, network in mlps.networks.items():
        key = form.format(name=network.name, id=layout_id, short=layout_id[:6])
        networks[key] = {"name": "mlp", "widths": [64, {"narrow": 3, "wide": 5}[network.name], 2]}
    (tmp_path / "networks.yaml").write_text(yaml.safe_dump({"networks": networks}))
    described = describe_corpus(mlps.location, str(tmp_path / "networks.yaml"))
    assert {net.name: net.recipe["widths"][1] for net in described.networks.values()} == {"narrow": 3, "wide": 5}


def test_describe_shows_the_names_there_are(mlps: Corpus, tmp_path: Path) -> None:
    (tmp_path / "networks.yaml").write_text("networks: {resnet20: {name: mlp, widths: [64, 3, 2]}}")
    with pytest.raises(CorpusError, match=r"holds no network 'resnet20'.*It holds '(narrow|wide)', '(narrow|wide)'"):
        describe_corpus(mlps.location, str(tmp_path / "networks.yaml"))
    result = CliRunner().invoke(app, ["corpus", "describe", mlps.location])
    assert result.exit_code == 0
    assert set(yaml.safe_load(result.stdout)["networks"]) == {"narrow", "wide"}
