"""`raywgen adapt` on a user's own sentences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.corpus import Corpus
from raywgen.generation import AdaptConfig, adapt, load
from raywgen.generators import StageConfig
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.out_folder import OutError
from raywgen.tasks import TaskError, balanced_accuracy, build_network
from raywgen.tasks.networks.text_adapter import HEAD
from raywgen.tasks.networks.text_models import encoder_digest
from raywgen.tasks.ridge_head import fit_ridge_head
from raywgen.tasks.user_data import ConditionError
from raywgen.training import TrainConfig, launch
from raywgen.weights import StateDict
from raywgen.weights.adapters import adapter_tensors, read_adapter
from tests.generation.test_adapter_sink import corpus, folder, run
from tests.generation.test_generate import bundle
from tests.text_encoders import make_encoder

__all__ = ["bundle", "corpus", "folder", "run"]
pytestmark = pytest.mark.usefixtures("one_thread")


def write(path: Path, labels: list[int], words: tuple[str, ...] = ("rain", "song", "dog")) -> str:
    others = ["the", "old", "new", "very"]
    sentences = [f"{others[n % 4]} {words[label]} is {others[n % 3]}" for n, label in enumerate(labels)]
    pq.write_table(pa.table({"sentence": sentences, "label": labels}), path)
    return str(path)


@pytest.fixture
def support(tmp_path: Path) -> str:
    return write(tmp_path / "support.parquet", [0, 1] * 8)


def test_a_folder_and_what_it_does_on_the_users_sentences(
    corpus: Corpus, run: str, support: str, tmp_path: Path
) -> None:
    test, out = write(tmp_path / "test.parquet", [0, 1] * 10), tmp_path / "adapter"
    found = adapt(AdaptConfig(generator=run, support=support, test=test, out=str(out), instruction="Rain or song?"))
    assert (found.classes, found.num_examples) == (("0", "1"), 16)
    # The same by hand: features by the network that the folder holds, and a head on them.
    network = next(iter(corpus.networks.values()))
    factors = read_adapter(out).factors
    state = {
        f"{name}.lora_{letter}": one for name, pair in factors.items() for letter, one in zip("AB", pair, strict=True)
    }
    module = build_network(network.recipe).eval()
    module.load_state_dict(state | load_file(out / HEAD), strict=True)
    form = load(run).sentences
    assert form is not None
    read = pq.read_table(test).to_pylist()
    samples_SF, labels_S = form.samples([row["sentence"] for row in read]), torch.tensor([row["label"] for row in read])
    accuracy = float(balanced_accuracy(module(samples_SF).unsqueeze(0), labels_S))
    assert found.on_test is not None
    assert found.on_test.accuracy == pytest.approx(accuracy)
    shown = pq.read_table(support).to_pylist()
    features_1SE = form.samples([row["sentence"] for row in shown])[:, :16].unsqueeze(0)
    known_1S = torch.tensor([[row["label"] for row in shown]])
    head = fit_ridge_head(features_1SE, known_1S, 2)
    alone = float(balanced_accuracy(head(samples_SF[:, :16].unsqueeze(0)), labels_S))
    assert found.head_alone_on_test is not None
    assert found.head_alone is not None
    assert found.head_alone_on_test.accuracy == pytest.approx(alone)
    assert found.head_alone.accuracy == pytest.approx(float(balanced_accuracy(head.left_out_BSC, known_1S)))
    facts = json.loads((out / "adapted.json").read_text())
    assert facts["instruction"] == "Rain or song?"
    assert facts["on_test"]["accuracy"] == pytest.approx(accuracy)


def test_the_command_prints_all_of_it(run: str, support: str, tmp_path: Path) -> None:
    arguments = ["adapt", run, "--support", support, f"test={support}", f"out={tmp_path / 'out'}", "best_of=4"]
    result = CliRunner().invoke(app, [*arguments, "temperature=0.5"])
    assert result.exit_code == 0, result.output
    for line in (
        "each left out in turn: accuracy",
        "a head on the encoder as it is: accuracy",
        "on the test sentences",
    ):
        assert line in result.output
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    again = CliRunner().invoke(app, [*arguments, "temperature=0.5"])
    assert again.exit_code == 0, "its own folder is written anew"


def test_a_test_sentence_of_an_unknown_class_is_refused_before_anything_is_written(
    run: str, support: str, tmp_path: Path
) -> None:
    test = write(tmp_path / "test.parquet", [0, 1, 2])
    with pytest.raises(ConditionError, match="label 2 is no class of the examples, which have 0 to 1"):
        adapt(AdaptConfig(generator=run, support=support, test=test, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_current_folder_is_not_filled(
    run: str, support: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutError, match="the current folder"):
        adapt(AdaptConfig(generator=run, support=support, out="."))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 0, 0], "have .4. sentences; give two classes or more"),
        ([0, 0, 1], "have .2, 1. sentences"),
        ([0, 2, 0, 2], r"labels are \[0, 2\]; number the classes"),
        ([0, 1, 2] * 3, "labels must lie between 0 and 1"),
    ],
)
def test_sentences_that_cannot_be_told_apart_are_refused(
    run: str, labels: list[int], message: str, tmp_path: Path
) -> None:
    support = write(tmp_path / "support.parquet", labels)
    with pytest.raises(ConditionError, match=message):
        adapt(AdaptConfig(generator=run, support=support, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_what_is_no_text_is_named(run: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"sentence": ["a dog", None], "label": [0, 1]}), tmp_path / "support.parquet")
    with pytest.raises(TaskError, match="row 1: 'sentence' is None; give a string or drop the row"):
        adapt(AdaptConfig(generator=run, support=str(tmp_path / "support.parquet"), out=str(tmp_path / "out")))


def test_an_encoder_that_changed_since_training_is_refused(
    corpus: Corpus, run: str, support: str, tmp_path: Path
) -> None:
    base = Path(next(iter(corpus.networks.values())).recipe["base"]["path"])
    shutil.copytree(base, tmp_path / "kept")
    try:
        make_encoder(base, seed=1)
        encoder_digest.cache_clear()
        with pytest.raises(TaskError, match=r"has changed: its weights are \w{12}, and what was made by it says"):
            adapt(AdaptConfig(generator=run, support=support, out=str(tmp_path / "out")))
    finally:
        shutil.copytree(tmp_path / "kept", base, dirs_exist_ok=True)
        encoder_digest.cache_clear()


@pytest.mark.parametrize("changes", [{"instruction": "Which?"}, {"test": "test.parquet"}, {"reads": "examples"}])
def test_settings_of_sentences_are_refused_by_other_generators(
    bundle: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConditionError, match="are of adapters of a text model"):
        adapt(AdaptConfig(generator=bundle, support="any.npz", out=str(tmp_path / "out"), **changes))


def test_a_generator_reads_a_part_alone_if_it_was_trained_to(
    corpus: Corpus, run: str, support: str, tmp_path: Path
) -> None:
    with pytest.raises(ConditionError, match="reads=examples: this generator was always trained with both"):
        adapt(AdaptConfig(generator=run, support=support, out=str(tmp_path / "none"), reads="examples"))
    config = TrainConfig(
        method="hypernetwork",
        generator=HypernetworkConfig(width=16, condition_dropout=0.5, task_loss=StageConfig(num_steps=4, batch_size=4)),
        corpus=corpus.location,
        out=str(tmp_path / "run"),
        num_workers=0,
        num_condition_samples=12,
        num_query_samples=12,
    )
    launch([config])

    def factors(reads: Literal["both", "instruction", "examples"], instruction: str) -> StateDict:
        out = str(tmp_path / f"{reads}-{instruction}")
        adapt(AdaptConfig(generator=config.out, support=support, out=out, reads=reads, instruction=instruction))
        return adapter_tensors(read_adapter(out))

    def same(reads: Literal["both", "instruction", "examples"]) -> bool:
        one, other = factors(reads, "Rain or song?"), factors(reads, "Dog or red?")
        return all(torch.equal(one[name], other[name]) for name in one)

    assert [same(reads) for reads in ("both", "instruction", "examples")] == [False, False, True]


def test_several_candidates_need_a_temperature() -> None:
    with pytest.raises(ValueError, match="best_of=4: give 1, or more with a temperature above 0"):
        AdaptConfig(support="any.parquet", best_of=4)
