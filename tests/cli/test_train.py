from __future__ import annotations

import json
import re
from pathlib import Path

from typer.testing import CliRunner

import raywgen
from raywgen import cli
from raywgen.corpus import Corpus
from raywgen.evaluation.report import ReportError

SIZES = {"num_steps": 3, "batch_size": 8, "quantiser": {"num_levels": 2, "num_codes": 8}, "width": 16}


def test_the_command_adds_page_and_tokens_to_a_run_from_python(zoo_corpus: Corpus, tmp_path: Path) -> None:
    run, none = tmp_path / "run", {"num_steps": 0}
    stages = {"tokenizer": SIZES, "prior": none, "task_loss": none}
    raywgen.train("igpg", corpus=zoo_corpus.location, out=run, num_workers=0, generator=stages, quiet=True)
    added = {"report.html", "tokenizer.json"}
    assert added.isdisjoint(path.name for path in run.iterdir())
    done = CliRunner().invoke(cli.app, ["train", str(run / "config.yaml")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert added <= {path.name for path in run.iterdir()}


def test_training_prints_and_keeps_what_the_tokeniser_is_worth(zoo_corpus: Corpus, tmp_path: Path) -> None:
    sizes = [
        "num_steps=3",
        "batch_size=8",
        "quantiser.num_levels=2",
        "quantiser.num_codes=8",
        "width=16",
        "coder=transformer",
    ]
    command = ["train", "igpg", f"corpus={zoo_corpus.location}", f"out={tmp_path / 'run'}", "num_workers=0"]
    command += [f"generator.tokenizer.{size}" for size in sizes]
    command += ["generator.prior.num_steps=0", "generator.task_loss.num_steps=0"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    text = " ".join(done.stdout.split())
    assert f"page: {tmp_path / 'run'}/report.html" in text
    assert "its stage tokenizer went to the end" in (tmp_path / "run" / "report.html").read_text()
    assert "Tokeniser: transformer coders, 2 residual tokens of 8 codes" in text
    kept = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    assert [split["split"] for split in kept["splits"]] == ["training", "held out"]
    # A page that cannot be drawn is no failure of a run that is done, and one of `raywgen report`.
    (tmp_path / "run" / "evaluation.json").write_text('{"schema_version": 0}')
    again = CliRunner().invoke(cli.app, command)
    assert again.exit_code == 0, again.exception
    assert "page:" not in again.stdout
    assert re.search(r"^no page: .*evaluation\.json is damaged: .*; run `raywgen evaluate` again$", again.stderr, re.M)
    drawn = CliRunner().invoke(cli.app, ["report", str(tmp_path / "run")])
    assert isinstance(drawn.exception, ReportError)
