"""`import raywgen` shows what users need: every name is documented, and its examples run as they stand."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import raywgen
from raywgen.corpus import Corpus
from raywgen.evaluation.results import Evaluation
from raywgen.generation import Filled

# What an example reads was made by one before it.
FIRST = ("train", "load", "TrainedGenerator", "generate", "build_corpus", "evaluate")
NAMES = [*FIRST, *(name for name in raywgen.__all__ if name not in (*FIRST, "__version__"))]
CONFIGS = {
    "adapt": raywgen.AdaptConfig,
    "build_corpus": raywgen.BuildConfig,
    "evaluate": raywgen.EvaluateConfig,
    "generate": raywgen.GenerateConfig,
    "train": raywgen.TrainConfig,
    "train_zoo": raywgen.ZooConfig,
    "tune": raywgen.TuneConfig,
}
SKIP = doctest.OPTIONFLAGS_BY_NAME["SKIP"]
# Each needs a generator of heads, a cluster, or minutes; its settings are checked in place of it.
NOT_RUN = {"adapt", "train_zoo", "tune"}


@pytest.fixture(scope="module")
def folder(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the examples run, with the corpus that they read."""
    folder, before, threads = tmp_path_factory.mktemp("surface"), Path.cwd(), torch.get_num_threads()
    shutil.copytree(zoo_corpus.location, folder / "runs/zoo/corpus")
    os.chdir(folder)
    torch.set_num_threads(1)
    yield folder
    os.chdir(before)
    torch.set_num_threads(threads)


def examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(getattr(raywgen, name)) or "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_its_examples_run(name: str, folder: Path) -> None:
    found = examples(name)
    assert found, f"raywgen.{name} has no example"
    assert all(example.options.get(SKIP) for example in found) == (name in NOT_RUN)
    test = doctest.DocTest(found, {"raywgen": raywgen, "torch": torch}, name, None, 0, None)
    said: list[str] = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not failed, "".join(said)
    assert tried == len(found) or name in NOT_RUN


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_in_examples_are_there(name: str) -> None:
    known = {field.name for field in dataclasses.fields(CONFIGS[name])}
    known |= set(inspect.signature(getattr(raywgen, name)).parameters)
    tree = ast.parse("".join(example.source for example in examples(name)))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name
    ]
    assert calls
    assert {str(keyword.arg) for call in calls for keyword in call.keywords} <= known


def test_every_name_is_listed_and_none_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, raywgen; listed = set(raywgen.__all__) <= set(dir(raywgen)); "
        "print(listed, *(name for name in ('torch', 'numpy', 'ray', 'pyarrow', 'omegaconf') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True"]


def test_a_name_that_is_not_there_is_no_attribute() -> None:
    unknown: Any = raywgen
    with pytest.raises(AttributeError, match="module 'raywgen' has no attribute 'trian'"):
        _ = unknown.trian


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: raywgen.train("mcdy"), "did you mean 'mcdi'?"),
        (lambda: raywgen.train("mcdi", sed=1), "unknown key 'sed' in the arguments; did you mean 'seed'?"),
        (lambda: raywgen.train(corpus="/no/where", num_workers=0), "/no/where holds no manifest.json"),
        (lambda: raywgen.train(raywgen.TrainConfig(), num_workers=-1), "num_workers=-1: must be at least 0"),
        (lambda: raywgen.train(raywgen.EvaluateConfig()), "config is a EvaluateConfig; give a TrainConfig"),  # pyright: ignore[reportArgumentType]
        (lambda: raywgen.generate(corpus="/no/where", out="x"), "/no/where holds no manifest.json"),
        (lambda: raywgen.evaluate(out=""), "out is empty"),
        (lambda: raywgen.tune("igpq"), "did you mean 'igpg'?"),
        (lambda: raywgen.build_corpus("x", "/"), "out=/ is the root of the file system"),
    ],
)
def test_a_mistake_is_one_line(call: Any, said: str) -> None:
    with pytest.raises((ValueError, KeyError)) as refused:
        call()
    message = str(refused.value.args[0])
    assert said in message
    assert "\n" not in message


def test_settings_come_before_those_of_a_config_and_groups_are_mappings() -> None:
    from raywgen.api import _resolved

    base = raywgen.TrainConfig(method="mcdi", seed=3, out="runs/a")
    config = _resolved(raywgen.TrainConfig, base, {"out": Path("runs/b"), "generator": {"denoiser": {"num_steps": 7}}})
    assert (config.out, config.seed, config.method) == ("runs/b", 3, "mcdi")
    assert config.generator.denoiser.num_steps == 7  # pyright: ignore[reportAttributeAccessIssue]
    assert base.out == "runs/a"


def test_reprs_say_what_a_thing_is(zoo_corpus: Corpus) -> None:
    layout = next(iter(zoo_corpus.networks.values())).layout
    assert repr(layout) == "Layout(4 tensors, 404 values, float32)"
    assert repr(zoo_corpus).endswith("154 checkpoints of 2 architectures and 19 tasks)")
    task = next(iter(zoo_corpus.tasks.values()))
    assert repr(task).startswith("TaskFacts('digits/")
    assert len(repr(task)) < 200
    adapter = raywgen.LoRAAdapter(factors={"0": (torch.ones(1, 4), torch.ones(3, 1))}, scales={"0": 1.0}, base="bert")
    assert repr(adapter) == "LoRAAdapter(1 modules of bert, rank 1)"
    assert repr(raywgen.inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), adapter)) == (
        "Injected(Sequential, 1 tensors changed)"
    )
    filled = Filled(module=torch.nn.Linear(2, 2), on_samples=None, best_of=4, log_prob=None, is_known=False)
    assert repr(filled) == "Filled(Linear, the best of 4, a layout that the generator was never trained on)"
    evaluation = Evaluation(layouts=("mlp",), rows=(), ladder=(), figures={"unseen_generated": 81.26, "random": 50.0})
    assert repr(evaluation) == "Evaluation(mlp, unseen_generated 81.3, 2 figures)"
