"""A module of the user's own is found beside where the command runs, and gets its `input_shape`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raywgen.corpus import Corpus
from raywgen.tasks import TaskError, build_network, network_name
from raywgen.trust import beside as beside_folder
from raywgen.trust import trusting
from tests.generation.test_generate import bundle

__all__ = ["bundle"]
CODE = """
from torch import nn

class MyNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 4, stride=4), nn.Linear(4 * width, 2)

    def forward(self, x):
        assert x.shape[1:] == (1, 8, 8), x.shape
        return self.last(self.first(x).relu().flatten(1))
"""


class EmbeddedCondition(nn.Module):
    """Is built by the shape of its inputs."""

    def __init__(self, input_shape: list[int]) -> None:
        super().__init__()
        self.last = nn.Conv2d(input_shape[0], 2, (input_shape[1], input_shape[2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x).flatten(1)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As the installed script runs it: without the current folder on the import path."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "raywgen", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def beside(folder: Path) -> str:
    (folder / "mynets_beside.py").write_text(CODE)
    return '[{name: "mynets_beside:MyNet", width: 3, input_shape: [1, 8, 8]}]'


def test_generate_finds_a_module_in_the_current_folder(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    task = next(iter(zoo_corpus.tasks.values()))
    np.savez(tmp_path / "mine.npz", x=task.samples_SF.numpy(), y=task.labels_S.numpy())
    settings = ("instruction=Is it?", "data=mine.npz", f"networks={beside(tmp_path)}", "out=out", "best_of=2")
    done = command(tmp_path, "generate", f"generator={bundle}", *settings)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out" / "networks.json").read_text())
    assert row["network"] == "MyNet-3"
    strange = 'networks=[{name: "nowhere_at_all:MyNet"}]'
    missing = command(tmp_path, "generate", f"generator={bundle}", *settings[:2], strange, "out=none")
    assert "cannot import network 'nowhere_at_all:MyNet'" in missing.stderr.splitlines()[-1]


def test_a_folder_in_which_one_works_stays_off_the_import_path(zoo_corpus: Corpus, tmp_path: Path) -> None:
    # Libraries try to import what may be installed, such as pandas these.
    for name in ("bottleneck", "numexpr", "mynets_beside"):
        (tmp_path / f"{name}.py").write_text(f"open('mark', 'a').write('{name} ')")
    done = command(tmp_path, "corpus", "info", zoo_corpus.location)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").exists()


def test_a_module_of_the_folder_brings_others_that_lie_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "beside_layers.py").write_text("from torch import nn\n\nclass Layer(nn.Linear):\n    pass\n")
    (tmp_path / "beside_nets.py").write_text("from beside_layers import Layer\n")
    with trusting("beside_nets"), pytest.raises(TaskError, match="No module"):
        build_network({"name": "beside_nets:Layer", "in_features": 2, "out_features": 2})
    with trusting("beside_nets"), beside_folder(str(tmp_path)):
        built = build_network({"name": "beside_nets:Layer", "in_features": 2, "out_features": 2})
    assert type(built).__module__ == "beside_layers"


@pytest.mark.slow
def test_workers_of_a_zoo_find_it_too(tmp_path: Path) -> None:
    sizes = ("num_seen_tasks=4", "num_validation_tasks=2", "num_unseen_tasks=2", "seeds_per_task=1")
    steps = ("num_steps=4", "checkpoint_steps=[4]")
    done = command(tmp_path, "zoo", "train", f"networks={beside(tmp_path)}", *sizes, *steps, "out=corpus")
    assert done.returncode == 0, done.stderr
    assert [network.name for network in Corpus.open(tmp_path / "corpus").networks.values()] == ["MyNet-3"]


def test_input_shape_reaches_a_class_that_asks_for_it() -> None:
    recipe = {"name": f"{__name__}:EmbeddedCondition", "input_shape": [1, 8, 8]}
    with trusting(__name__):
        assert build_network(recipe)(torch.zeros(3, 64)).shape == (3, 2)
        assert network_name(recipe) == "EmbeddedCondition-1-8-8"
