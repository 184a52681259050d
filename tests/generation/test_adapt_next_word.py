"""`raywgen adapt` on a user's own texts, for a causal language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.config import SHIPPED, load_config
from raywgen.generation import AdaptConfig, adapt
from raywgen.tasks import TaskError
from raywgen.tasks.networks.text_models import causal_digest, load_causal_model, load_tokenizer
from raywgen.training import TrainConfig, launch
from raywgen.weights.cache import FOLDER
from raywgen.zoo import ZooConfig, train_zoo
from tests.text_encoders import make_decoder, make_sentences

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["the rain is old", "very new rain of song", "rain", "old rain is rain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("next-word")


@pytest.fixture(scope="module")
def run(folder: Path) -> str:
    """A hypernetwork after a few steps, by the shipped recipes."""
    patch = pytest.MonkeyPatch()
    patch.setenv(FOLDER, str(folder / "cache"))
    path, base = make_sentences(folder / "signs.parquet"), make_decoder(folder / "decoder")
    counts = ["num_seen_tasks=2", "num_validation_tasks=1", "num_unseen_tasks=1", "num_steps=2", "checkpoint_steps=[2]"]
    tasks = [f"tasks.path={path}", f"tasks.base={base}", "tasks.kind=domain-classes", "tasks.limit=20"]
    zoo = load_config(ZooConfig, SHIPPED / "zoo" / "domain-lora.yaml", [*counts, *tasks])
    corpus = train_zoo(zoo, str(folder / "zoo"), distributed=False)
    stage = ["generator.task_loss.num_steps=6", "generator.width=16", "shot=8", "num_query_samples=4"]
    stage += ["generator.task_loss.optimizer.learning_rate=0.3"]  # It is to differ from the model in few steps.
    given = [f"corpus={corpus.location}", f"out={folder / 'run'}", *stage]
    launch([load_config(TrainConfig, SHIPPED / "hypernetwork" / "domain-lora.yaml", given)])
    patch.undo()
    return str(folder / "run")


@pytest.fixture
def support(tmp_path: Path) -> str:
    pq.write_table(pa.table({"sentence": TEXTS}), tmp_path / "support.parquet")
    return str(tmp_path / "support.parquet")


@torch.no_grad()
def test_what_is_printed_is_what_peft_does(run: str, folder: Path, support: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    out, base = tmp_path / "adapter", str(folder / "decoder")
    found = adapt(AdaptConfig(generator=run, support=support, test=support, out=str(out)))
    assert found.next_word is not None
    assert found.next_word == found.next_word_on_test
    model = load_causal_model(base)

    def loss() -> float:
        tokens = [torch.tensor([[0, *load_tokenizer(base)(text)["input_ids"]]]) for text in TEXTS]
        return float(torch.stack([model(input_ids=one_1T, labels=one_1T).loss for one_1T in tokens]).mean())

    assert found.next_word.base == pytest.approx(loss(), abs=1e-5)
    model = peft.PeftModel.from_pretrained(model, str(out)).eval()
    assert found.next_word.adapted == pytest.approx(loss(), abs=1e-5)
    assert abs(found.next_word.adapted - found.next_word.base) > 1e-4
    facts = json.loads((out / "adapted.json").read_text())
    assert facts["next_word_on_test"]["base"] == pytest.approx(found.next_word.base)
    assert facts["instruction"] == "Continue texts like these."


def test_the_command_prints_the_loss_with_and_without(run: str, support: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["adapt", run, "--support", support, f"test={support}", f"out={tmp_path / 'out'}"])
    assert result.exit_code == 0, result.output
    assert "values from 4 examples" in result.output
    for line in ("next words of these examples, which it has read: ", "next words of the test texts: "):
        assert line in result.output
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_a_model_that_changed_since_training_is_refused(
    run: str, folder: Path, support: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = causal_digest(str(folder / "decoder"))
    other = make_decoder(tmp_path / "decoder", seed=1)
    monkeypatch.setattr("raywgen.tasks.networks.text_models.causal_digest", lambda _: causal_digest(other))
    assert causal_digest(other) != before
    with pytest.raises(TaskError, match=r"the language model .* has changed"):
        adapt(AdaptConfig(generator=run, support=support, out=str(tmp_path / "adapter")))
