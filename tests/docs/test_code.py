"""The Python and YAML of README and site: all of it parses and finds what it imports; most of it runs, if small."""

from __future__ import annotations

import ast
import importlib
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import raywgen.weights
from raywgen.corpus import Corpus
from raywgen.generators import DataSpec
from raywgen.generators.bundle import ENCODER, build_generator, save_bundle
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.mcdi import McDi, McDiConfig
from raywgen.tasks import build_network
from raywgen.tasks.encoders import EncoderCard, save_encoder
from raywgen.tasks.runnable import runnable
from raywgen.tasks.user_data import read_data
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.weights import Layout, Normalizer
from tests.builders import igpg_config
from tests.docs.pages import ROOT, Block, blocks

PYTHON = blocks("python")
HUB = "sentence-transformers/all-MiniLM-L6-v2"
# Blocks that run elsewhere, by a word of theirs: where.
ELSEWHERE = {
    'raywgen.train_zoo("digits", out=': "tests/docs/test_wheel.py, at small size",
    "trained.classifier((images, labels))": "tests/generation/test_heads.py, with images of its own",
    'AutoModelForCausalLM.from_pretrained("MODEL")': "tests/generation/test_adapt_next_word.py, with a small model",
    HUB: "below, with a small model in place of that of the hub",
}
RUN = [block for block in PYTHON if not any(word in block.text for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart was run, with a small corpus and a generator that was never trained."""
    place = tmp_path_factory.mktemp("reader")
    normalizers, data = measure_normalizers(zoo_corpus), data_spec(zoo_corpus)
    save_bundle(build_generator("igpg", igpg_config(), normalizers, data, seed=0), place / "runs/demo/igpg", {})
    (place / "runs/zoo").mkdir()
    (place / "runs/zoo/corpus").symlink_to(zoo_corpus.location)
    rng = np.random.default_rng(0)
    np.savez(place / "examples.npz", x=rng.random((64, 1, 8, 8), dtype=np.float32), y=np.arange(64) % 2)
    write_heads(place / "runs/mcdi")
    for index in range(10):
        (folder := place / f"examples/{index % 5}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{index}.png")
    return place


def write_heads(folder: Path) -> None:
    """Writes a generator of heads for 5 classes of images of 28 x 28, on 64 features of an encoder."""
    layout = Layout.from_state_dict(nn.Linear(64, 5).state_dict())
    known = Normalizer(layout, torch.zeros(2), torch.ones(2))
    config = McDiConfig(network=NetworkConfig(width=16, num_heads=2, num_layers=1))
    generator = McDi(config, {layout.id: (layout, known)}, DataSpec(num_features=64, max_classes=5))
    inputs = {"size": 28, "channels": 1, "mean": [0.2], "std": [0.5], "encoder": "gone"}
    save_bundle(generator.eval(), folder, {"inputs": inputs})
    recipe = {"name": "conv4", "width": 64, "image_size": 28}
    card = EncoderCard(network=recipe, size=28, channels=1, mean=(0.2,), std=(0.5,))
    save_encoder(build_network(recipe).state_dict(), card, str(folder / ENCODER))


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


@pytest.mark.parametrize("block", [block for block in PYTHON if HUB in block.text], ids=str)
def test_python_for_models_of_the_hub_runs_on_a_small_one(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.BertModel(transformers.BertConfig(intermediate_size=16, **sizes))
    base.save_pretrained("base")
    kinds = {"AutoModel.": ("FEATURE_EXTRACTION", []), "AutoModelForSequence": ("SEQ_CLS", ["classifier"])}
    (word,) = [word for word in kinds if word in block.text]
    kind, saved = kinds[word]
    whole = base if kind != "SEQ_CLS" else transformers.BertForSequenceClassification(base.config)
    lora = peft.LoraConfig(task_type=kind, r=2, target_modules=["query", "value"], modules_to_save=saved or None)
    peft.get_peft_model(whole, lora).save_pretrained("adapter")
    exec(compile(block.text.replace(HUB, "base"), block.page, "exec"), found := {})
    assert found["adapted"].active_adapter == "default"


@pytest.mark.parametrize("word", ELSEWHERE)
def test_what_runs_elsewhere_is_there(word: str) -> None:
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
