"""Every program of `examples/` runs as it is, at small size, and leaves what it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors.torch import load_file

import raywgen
from examples import adapt_images, adapt_language_model, large_resnet, own_checkpoints, tune_on_ray
from raywgen.corpus import Corpus
from raywgen.tasks import build_network
from raywgen.weights.adapters import read_adapter
from tests.jobs.conftest import LocalCluster, one_node

__all__ = ["one_node"]
pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 100
TOKENIZER = ("generator.tokenizer.num_steps=20", "generator.tokenizer.width=32", "generator.tokenizer.batch_size=8")
CODES = ("generator.tokenizer.quantiser.num_codes=16", "generator.tokenizer.quantiser.num_levels=2")
PRIOR = ("generator.prior.num_steps=3", "generator.prior.width=16", "generator.prior.num_layers=1")
HEADS = ("generator.prior.num_heads=2", "generator.prior.batch_size=4")
SMALL = (*TOKENIZER, *CODES, *PRIOR, *HEADS)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWGEN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_says_what_it_shows_what_it_needs_and_how_long_it_takes(path: Path) -> None:
    text = path.read_text()
    words = ast.get_docstring(ast.parse(text))
    assert words is not None
    if path.stem != "flow_matching":  # A whole method, which is as long as it is.
        assert len(text.splitlines()) <= MOST_LINES
        assert words.startswith("Shows how ")
        assert re.search(r"(?i)\bneeds?\b", words)
        assert re.search(r"\bIt takes\b|\bminutes\b", words)
        assert f"python examples/{path.name}" in words


def test_own_checkpoints_become_a_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = own_checkpoints.main(str(tmp_path), num_networks=6, num_steps=20, settings=SMALL)
    shown = capsys.readouterr().out
    assert f"{tmp_path}/corpus: 6 checkpoints" in shown
    network = raywgen.load(tmp_path / "igpg").fill(own_checkpoints.perceptron())
    assert own_checkpoints.accuracy(network) == accuracy
    assert f"generated {accuracy:.3f}" in shown


def test_a_resnet_is_written_in_pieces(tmp_path: Path) -> None:
    recipe = {"name": "cifar-resnet", "depth": 8, "widths": [4, 8, 8], "in_channels": 1}
    windows = ("generator.tokenizer.window=16", "generator.prior.window=8", "generator.task_loss.num_steps=0")
    path = large_resnet.main("", str(tmp_path), recipe, (*SMALL, *windows), piece_values=1024)
    assert set(load_file(path)) == set(build_network(recipe).state_dict())


def test_a_folder_of_images_becomes_a_head(tmp_path: Path) -> None:
    classes = adapt_images.main("", str(tmp_path), num_episodes=4, num_tasks=12, num_steps=4)
    assert classes == ("digit-3", "digit-5", "digit-8")
    # Which of several heads is the best is not the example's to say: one block of the encoder, or two.
    state = load_file(tmp_path / "head.safetensors")
    assert state["weight"].shape[0] == 3
    assert state["weight"].shape[1] % adapt_images.WIDTH == 0
    assert state["bias"].shape == (3,)


def test_a_language_model_is_adapted(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the example needs it")
    folder = adapt_language_model.main(out=str(tmp_path), num_steps=4)
    assert read_adapter(folder).factors


@pytest.mark.slow
def test_settings_are_searched_on_ray(tmp_path: Path) -> None:
    small: dict[str, Any] = {"zoo.num_seen_tasks": 4, "zoo.num_validation_tasks": 1, "zoo.num_unseen_tasks": 1}
    small |= {"zoo.num_steps": 20, "zoo.checkpoint_steps": [20], "train.generator.task_loss.num_steps": 8}
    result = tune_on_ray.main(str(tmp_path / "tune"), num_trials=2, fixed=small)
    assert len(result.rows) == 2
    for name in ("report.html", "best/generator/generator.json"):
        assert (tmp_path / "tune" / name).is_file()


@pytest.mark.slow
def test_a_job_is_sent_followed_and_read(one_node: LocalCluster, zoo_corpus: Corpus, tmp_path: Path) -> None:
    steps = ["generator.task_loss.num_steps=3", "num_workers=0"]
    settings = [f"corpus={zoo_corpus.location}", f"out={tmp_path / 'run'}", *steps]
    # In a process of its own, as Ray reads the cluster's token when it is imported.
    done = one_node.run("python", "examples/submit_job.py", one_node.dashboard, *settings)
    assert done.returncode == 0, done.stderr
    assert "SUCCEEDED" in done.stdout
    assert "hypernetwork, done" in done.stdout


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    settings = [*SMALL, "generator.task_loss.num_steps=3"]
    parameters.source = f"OUT, NUM_TASKS, NUM_STEPS = {str(tmp_path / 'out')!r}, 12, 60\nSETTINGS = {settings!r}"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    *_, last, _ = notebook.cells
    assert "On unseen tasks, generated networks score" in last.outputs[-1]["data"]["text/plain"]
    assert (tmp_path / "out" / "igpg" / "report.html").is_file()


def test_the_notebook_holds_no_output(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
