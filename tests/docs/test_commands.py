"""The commands of README and site can be typed: each parses, its settings exist, and no two write to the same place.

What takes minutes is not run here. What a command reads is made by one before it, or is the user's own.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer

from raywgen.benchmarks.record import split_record
from raywgen.benchmarks.run import BENCHMARKS
from raywgen.cli import app
from raywgen.cli.settings import SCHEMAS, split_config
from raywgen.config import load_config, shipped_config
from raywgen.corpus.storage import CorpusStorage
from raywgen.training import load_train_config
from raywgen.training.plan import PlanConfig, split_overrides
from tests.docs.pages import DOCS, PAGES, ROOT, Line, blocks, inline_commands, lines, text_of

# Written by the one command, and taken further by the other.
_GOES_ON = {"runs/igpg/evaluation", "rendered"}
# Words that stand for what a reader fills in.
_PLACEHOLDER = re.compile(r"\.\.\.|\b(NAME|COMMAND|RUN|CORPUS|TASK|TOKENS|ID|FILE|PATH)\b")

RAYWGEN = [Line(line.page, line.words[1:]) for line in lines() if line.words[0] == "raywgen"]
WITHIN_SENTENCES = [
    Line(line.page, line.words[1:]) for line in inline_commands("raywgen ") if not _PLACEHOLDER.search(str(line))
]
RECORDS = [
    Line(f"docs/results/{path.name}", tuple(shlex.split(json.loads(path.read_text())["command"])))
    for path in sorted((DOCS / "results").glob("*.json"))
]
BENCHES = [
    line
    for line in [*lines(), *inline_commands("python jobs/benchmark.py"), *RECORDS]
    if line.words[:2] == ("python", "jobs/benchmark.py") and not _PLACEHOLDER.search(str(line))
]


@pytest.fixture(autouse=True)
def _made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpora that a page names are made by its commands, and none is here."""
    monkeypatch.setattr(CorpusStorage, "check_manifest", lambda self: None)


def parsed(line: Line) -> tuple[str, dict[str, Any]]:
    """The command's path, and its parameters as click reads them; without any arguments, or for help, none."""
    # Typer brings click along under a name of its own.
    command: Any = typer.main.get_command(app)
    words, names = list(line.words), []
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            return " ".join(names), command.make_context("raywgen", words, resilient_parsing=True).params
        names.append(words.pop(0))
        assert names[-1] in command.commands, line
        command = command.commands[names[-1]]
    if "--help" in words or (not words and line in WITHIN_SENTENCES):
        return "", {}
    return " ".join(names), command.make_context(names[-1], words).params


def settings(path: str, params: dict[str, Any]) -> Any:
    """The config that a command runs by."""
    module, _, name = SCHEMAS[path].partition(":")
    config, rest = split_config(params.get("config"), params.get("overrides"))
    rest += [f"{key}={params[key]}" for key in ("corpus", "support") if params.get(key)]
    rest += [f"generator={params['bundle']}"] if params.get("bundle") else []
    if path == "plan":
        own, rest = split_overrides(rest)
        load_config(PlanConfig, None, own)
    if path in ("plan", "train"):
        return load_train_config(config, rest)
    folder = path.partition(" ")[0]
    if folder in ("zoo", "tune"):
        config = shipped_config(folder, config)
    return load_config(getattr(importlib.import_module(module), name), config, rest)


def has_settings(path: str, params: dict[str, Any]) -> bool:
    """Whether a command's settings can be read here: not those of a cluster, nor of a file that a search makes."""
    return path in SCHEMAS and path != "cluster render" and not str(params.get("config", "")).startswith("runs/")


@pytest.mark.parametrize("line", [*RAYWGEN, *WITHIN_SENTENCES], ids=str)
def test_a_command_parses_and_its_settings_exist(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path, params = parsed(line)
    if has_settings(path, params):
        settings(path, params)
    if path == "job submit":
        assert (ROOT / "jobs" / f"{params['job']}.py").is_file()


def test_no_two_commands_write_to_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    places: dict[str, Line] = {}
    for line in RAYWGEN:
        path, params = parsed(line)
        if not has_settings(path, params):
            continue
        if path == "plan":
            continue
        out = settings(path, params).out
        first = places.setdefault(out, line)
        assert out in _GOES_ON or first.words == line.words, f"{line} writes to {out}, as {first} does"


def test_what_is_read_is_made_by_a_command_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made: set[str] = set()
    for line in RAYWGEN:
        path, params = parsed(line)
        if path == "demo":
            made |= {"runs/demo/igpg", "runs/demo/corpus"}
        if path.startswith("corpus"):
            made |= {value for value in params.values() if isinstance(value, str) and value.startswith("runs/")}
        if path.startswith("corpus") or path in ("tune", "plan") or not has_settings(path, params):
            continue
        config = settings(path, params)
        needed = [getattr(config, name, "") for name in ("corpus", "generator", "hypernetwork")]
        for place in [each for each in needed if isinstance(each, str) and each.startswith("runs/")]:
            assert place in made, f"{line} reads {place}, which no command before it makes"
        made.add(config.out)


@pytest.mark.parametrize("line", BENCHES, ids=str)
def test_a_benchmark_is_there_and_has_these_settings(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some settings name a folder that must hold these.
    for file in ("cifar10-train.parquet", "cifar10-test.parquet"):
        (tmp_path / "pretrained").mkdir(exist_ok=True)
        (tmp_path / "pretrained" / file).touch()
    monkeypatch.chdir(tmp_path)
    name, *rest = line.words[2:]
    assert name in BENCHMARKS
    measure = importlib.import_module(BENCHMARKS[name]).measure
    load_config(get_type_hints(measure)["config"], None, split_record(rest)[0])


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_clone_that_it_names_are_there(page: str) -> None:
    names = set(re.findall(r"\b(?:configs|jobs|examples|tests|raywgen)/[\w/.-]+\.(?:yaml|txt|py)\b", text_of(page)))
    for name in names - {"jobs/NAME.py"}:
        assert (ROOT / name).is_file(), name


def test_all_of_this_is_about_something() -> None:
    assert len(RAYWGEN) > 60
    assert len(BENCHES) > 40
    assert len(WITHIN_SENTENCES) > 10
    assert len(blocks("python")) > 8
