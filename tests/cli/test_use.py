from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from raywgen import cli
from raywgen.corpus import Corpus
from raywgen.tasks import build_network
from raywgen.weights import load_state_dict, save_state_dict


def output_of(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.stdout.split())


def test_retrieve_names_the_nearest_and_writes_it(zoo_corpus: Corpus, tmp_path: Path) -> None:
    task = next(iter(zoo_corpus.tasks))
    out = tmp_path / "best.safetensors"
    shown = output_of("retrieve", zoo_corpus.location, f"task={task}", f"out={out}", "top=2")
    assert "nearest first by loss" in shown
    assert f"/{task}/" in shown.replace(" ", "")
    assert out.is_file()
    assert out.with_suffix(".json").is_file()


def test_select_prints_the_ranking_and_what_it_is_worth(zoo_corpus: Corpus, tmp_path: Path) -> None:
    task = next(iter(zoo_corpus.tasks))
    shown = output_of("select", zoo_corpus.location, f"task={task}", f"out={tmp_path / 'selected.json'}")
    assert "Best first, by predicted" in shown
    assert "What such a ranking is worth" in shown
    assert "rank correlation" in shown


def test_finetune_prints_a_row_a_start(zoo_corpus: Corpus, tmp_path: Path) -> None:
    settings = [f"corpus={zoo_corpus.location}", f"out={tmp_path}", "start=[random,shared]", "epochs=1", "limit=1"]
    shown = output_of("finetune", *settings, "network=mlp-64-6-2", "learning_rates=[0.003]")
    assert "after 1" in shown
    assert "random" in shown
    assert "shared" in shown
    assert (tmp_path / "finetune.json").is_file()
    assert f"page: {tmp_path}/report.html" in shown
    assert "Before training, random 50.0 %" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("command", "setting"),
    [("retrieve", "num_samples"), ("select", "best_of"), ("finetune", "learning_rates"), ("statistics", "batch_size")],
)
def test_help_lists_the_settings(command: str, setting: str) -> None:
    shown = output_of(command, "--help-all")
    assert f" {setting}=" in shown
    assert f"raywgen {command}" in shown


def test_statistics_writes_a_network_and_says_how_far_they_moved(tmp_path: Path) -> None:
    recipe = {"name": "cifar-resnet", "depth": 8, "widths": [4, 4, 4], "in_channels": 1}
    save_state_dict(build_network(recipe).state_dict(), tmp_path / "net.safetensors", {})
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    network = "network={name: cifar-resnet, depth: 8, widths: [4, 4, 4], in_channels: 1}"
    shown = output_of("statistics", str(tmp_path / "net.safetensors"), network, f"data={tmp_path / 'images.npy'}")
    assert "net-statistics.safetensors: new statistics of 7 layers, 28 channels" in shown
    assert "from 40 inputs of 1x8x8" in shown
    assert "variances by a factor of" in shown
    assert "give mean= and std= if the network was trained with others" in shown
    assert set(load_state_dict(tmp_path / "net-statistics.safetensors")) == set(build_network(recipe).state_dict())
