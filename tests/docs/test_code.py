"""The Python and YAML of README and site: all of it parses and finds what it imports; most of it runs, if small."""

from __future__ import annotations

import ast
import importlib
import re
import warnings
from pathlib import Path

import pytest
import yaml

import raywgen.weights
from raywgen.corpus import Corpus
from raywgen.generators.bundle import build_generator, save_bundle
from raywgen.tasks.runnable import runnable
from raywgen.tasks.user_data import read_data
from raywgen.training.data import data_spec, measure_normalizers
from tests.builders import igpg_config
from tests.docs.pages import ROOT, Block, blocks

PYTHON = blocks("python")
# Blocks that no test runs, by a word of theirs: with what they need beside raywgen.
NOT_RUN = {
    "tuned = fine_tune(module, layout,": "a module and vectors of the reader's own",
    'raywgen.train_zoo("digits", out=': "minutes; tests/test_surface.py calls these functions",
    'trained = raywgen.load("runs/mcdi")': "images of the reader's own",
    "AutoModel.from_pretrained(": "a model of the hub",
    "AutoModelForSequenceClassification.from_pretrained(": "a model of the hub",
}
RUN = [block for block in PYTHON if not any(word in block.text for word in NOT_RUN)]


@pytest.fixture(scope="module")
def folder(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart was run, with a small corpus and a generator that was never trained."""
    place = tmp_path_factory.mktemp("reader")
    normalizers, data = measure_normalizers(zoo_corpus), data_spec(zoo_corpus)
    save_bundle(build_generator("igpg", igpg_config(), normalizers, data, seed=0), place / "runs/demo/igpg", {})
    (place / "runs/zoo").mkdir()
    (place / "runs/zoo/corpus").symlink_to(zoo_corpus.location)
    return place


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_parses_and_finds_what_it_imports(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("block", RUN, ids=str)
def test_python_runs(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # The generator was never trained, and says so.
        exec(compile(block.text, block.page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("word", NOT_RUN)
def test_what_is_not_run_is_there(word: str) -> None:
    assert any(word in block.text for block in PYTHON)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_parses(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


def test_the_network_of_the_generating_guide_takes_the_samples_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (block,) = [block for block in PYTHON if "mynets.py" in block.text]
    exec(compile(block.text, block.page, "exec"), {})
    data = read_data("examples.npz")
    runs, samples = runnable(importlib.import_module("mynets").MyNet(), [data.x], 2)
    assert runs(samples).shape == (64, 2)


def test_the_legend_of_shape_letters_is_the_code_s() -> None:
    legend = re.findall(r"\b([A-Z])  (\S.*?)(?=\s{2,}[A-Z]  |$)", raywgen.weights.__doc__ or "", re.MULTILINE)
    page = (ROOT / "docs/concepts.md").read_text()
    assert len(legend) > 10
    for letter, meaning in legend:
        assert f"| {letter} | {meaning} |" in page, (letter, meaning)
