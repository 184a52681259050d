from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.runlog import METRICS
from raywgen.training.status import run_status
from raywgen.training.workers_log import WORKERS, add_start, add_trouble


@pytest.fixture(scope="module")
def finished(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    igpg = IGPGConfig(
        tokenizer=TokenizerConfig(
            num_steps=4, batch_size=8, quantiser=QuantiserConfig(num_levels=2, num_codes=16), width=16
        ),
        prior=PriorConfig(num_steps=6, batch_size=8, width=16, num_layers=1, num_heads=2),
        task_loss=IGPGTaskLossConfig(num_steps=0),
    )
    out = tmp_path_factory.mktemp("run") / "igpg"
    launch([TrainConfig(generator=igpg, corpus=zoo_corpus.location, out=str(out), num_workers=0, log_every=1)])
    return out


def test_a_finished_run(finished: Path) -> None:
    status = run_status(finished)
    assert (status.done, status.finished, status.stage) == (True, ["tokenizer", "prior"], "prior")
    assert (status.step, status.num_steps) == (6, 6)
    assert status.lines()[0] == f"{finished}: igpg, done"
    assert "left in this stage" not in "".join(status.lines())


def test_a_run_under_way(finished: Path, tmp_path: Path) -> None:
    """The folder as it was in the middle of the second stage."""
    out = tmp_path / "igpg"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "generator")
    shutil.rmtree(out / "stages" / "prior")
    rows = [row for row in read_metrics(finished) if row["stage"] == "tokenizer" or row["step"] < 3]
    for number, row in enumerate(rows):
        row["time"] = 0.5 * number
    rows[-1]["perf"] = {"values_per_second": 1_234_567.0, "input_wait": 0.02, "anon_gib": 1.25}
    (out / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "pri')
    status = run_status(out)
    assert (status.done, status.finished) == (False, ["tokenizer"])
    assert (status.stage, status.step, status.num_steps) == ("prior", 3, 6)
    assert status.steps_per_second == pytest.approx(2.0)
    assert status.scalars["loss"] == rows[-1]["loss"]
    lines = status.lines()
    assert lines[1] == "stages trained: tokenizer"
    assert lines[2].startswith("prior: step 3 of 6, ")
    assert lines[3] == "2 steps/s, 2 s left in this stage"
    assert lines[4] == "1.23M values/s, 2% waiting for input, 1.2 GiB"


def test_a_run_before_its_first_row(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "config.yaml", tmp_path)
    assert run_status(tmp_path).lines() == [f"{tmp_path}: igpg, not begun"]


def test_a_folder_without_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run \(config.yaml is missing\)"):
        run_status(tmp_path)


def test_the_history_of_workers(finished: Path, tmp_path: Path) -> None:
    """The folder of a run that lost a node in its second stage and has a new one since."""
    out = tmp_path / "igpg"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "generator")
    (out / WORKERS).unlink()
    assert run_status(out).lines()[-1] == "newest checkpoint: step 0 of the end"
    add_start(out, "one", 3, "tokenizer", 0, [])
    assert run_status(out).lines()[-1].startswith("3 workers, since ")
    add_trouble(out, "rank 2 (node b, process 7, log /logs/b) died")
    add_start(out, "one", 1, "prior", 4, [])
    add_start(out, "one", 3, "prior", 5, [])
    workers, again, newest, first = run_status(out).lines()[-4:]
    assert workers.startswith("3 workers, since ")
    assert again == "started again 2 times, newest first:"
    assert newest.endswith(
        "there was room for 3 workers instead of 1; from step 5 of prior by 3 workers, before by 1 worker"
    )
    assert first.endswith(
        "rank 2 (node b, process 7, log /logs/b) died; from step 4 of prior by 1 worker, before by 3 workers"
    )


def test_following_ends_with_the_run(finished: Path) -> None:
    answer = CliRunner().invoke(app, ["status", str(finished), "--follow"])
    assert answer.exit_code == 0, answer.output
    assert "prior: step 6 of 6" in answer.output
    assert "one process without workers" in answer.output
