"""`record=` keeps what a benchmark printed, and how to take it again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raywgen.benchmarks import record, run

RESULT = {"benchmark": "plan", "figures": {"ratio": 1.5}, "conditions": {"seeds": 3}}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Lists the settings that benchmarks were run with; none is really run."""
    calls: list[list[str]] = []
    monkeypatch.setattr(run, "run", lambda arguments: calls.append(arguments) or RESULT)
    return calls


def test_the_result_is_written_as_printed_with_what_it_takes_to_repeat_it(
    measured: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "plan", f"record={tmp_path}/new/results", "methods=[mcdi, lohp]"])
    run.main()
    assert measured == [["plan", "methods=[mcdi, lohp]"]]
    kept = json.loads((tmp_path / "new/results/plan.json").read_text())
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: kept[key] for key in printed} == printed == RESULT
    assert kept["command"] == "python jobs/benchmark.py plan 'methods=[mcdi, lohp]'"
    assert kept["transcribed"] is False
    assert kept["machine"]["cores"] >= 1
    assert kept["machine"]["cpu"]
    assert len(kept["date"].split("-")) == 3


def test_the_commit_is_the_one_that_the_benchmark_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["first", "second"])
    monkeypatch.setattr(record, "commit", lambda _: next(commits))
    monkeypatch.setattr(run, "run", lambda _: RESULT if next(commits) == "second" else None)
    monkeypatch.setattr(sys, "argv", ["", "plan", f"record={tmp_path}"])
    run.main()
    assert json.loads((tmp_path / "plan.json").read_text())["commit"] == "first"


def test_a_file_may_be_named(measured: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", "plan", f"record={tmp_path}/other.json"])
    run.main()
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_what_cannot_be_written_is_refused_before_anything_runs(
    measured: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path in (f"{tmp_path}/file/results", "s3://bucket/results"):
        monkeypatch.setattr(sys, "argv", ["", "plan", f"record={path}"])
        with pytest.raises(SystemExit):
            run.main()
        assert f"record={path}" in capsys.readouterr().err
    assert measured == []


def test_the_commit_is_that_of_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "raywgen/benchmarks"
    package.mkdir(parents=True)
    monkeypatch.setattr(record, "__file__", str(package / "record.py"))
    records = tmp_path / "docs/results"
    assert record.commit(records) == ""

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *names, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert record.commit(records) == git("rev-parse", "HEAD")
    records.mkdir(parents=True)
    (records / "demo.json").write_text("{}")
    assert record.commit(records) == git("rev-parse", "HEAD"), "a record of another benchmark is no change of the code"
    (tmp_path / "file").write_text("2")
    assert record.commit(records) == git("rev-parse", "HEAD") + "+changes"
    assert record.commit(tmp_path.parent) == git("rev-parse", "HEAD") + "+changes"
