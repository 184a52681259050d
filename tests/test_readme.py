"""The README's commands can be typed: each parses, its settings exist, and no two write to the same place.

What takes minutes is not run here. What a command reads is made by one before it, or is the user's own.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from raywgen.benchmarks.run import BENCHMARKS
from raywgen.cli import app
from raywgen.cli.settings import SCHEMAS, split_config
from raywgen.config import load_config, shipped_config
from raywgen.generators import METHODS, is_import_path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# Written by the one command, and taken further by the other.
_GOES_ON = {"runs/igpg/evaluation"}


@dataclass(frozen=True)
class Line:
    """A command of the README.

    Attributes:
        words: As a shell splits it.
    """

    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.words)


def blocks(language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall((ROOT / "README.md").read_text()) if kind == language]


def lines() -> Iterator[Line]:
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(re.sub(r" >+ \S+", "", part), comments=True)
                if words:
                    yield Line(tuple(words))


RAYWGEN = [Line(line.words[1:]) for line in lines() if line.words[0] == "raywgen"]
BENCHES = [line for line in lines() if line.words[:2] == ("python", "jobs/benchmark.py")]


def parsed(line: Line) -> tuple[str, dict[str, Any]]:
    """The command's path, and its parameters as click reads them."""
    # Typer brings click along under a name of its own.
    command: Any = typer.main.get_command(app)
    words, names = list(line.words), []
    while hasattr(command, "commands"):
        names.append(words.pop(0))
        assert names[-1] in command.commands, line
        command = command.commands[names[-1]]
    return " ".join(names), command.make_context(names[-1], words).params


def settings(path: str, params: dict[str, Any]) -> Any:
    """The config that a command runs by."""
    module, _, name = SCHEMAS[path].partition(":")
    config, rest = split_config(params.get("config"), params.get("overrides"))
    rest += [f"{key}={params[key]}" for key in ("corpus", "support") if params.get(key)]
    rest += [f"generator={params['bundle']}"] if params.get("bundle") else []
    if path == "train" and config is not None and (config in METHODS or is_import_path(config)):
        config, rest = None, [f"method={config}", *rest]
    folder = path.partition(" ")[0]
    if folder in ("zoo", "tune"):
        config = shipped_config(folder, config)
    return load_config(getattr(importlib.import_module(module), name), config, rest)


@pytest.mark.parametrize("line", RAYWGEN, ids=str)
def test_a_command_parses_and_its_settings_exist(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path, params = parsed(line)
    made_by_tune = str(params.get("config", "")).startswith("runs/")
    if path in SCHEMAS and path != "cluster render" and not made_by_tune:
        settings(path, params)
    if path == "job submit":
        assert (ROOT / "jobs" / f"{params['job']}.py").is_file()


def test_no_two_commands_write_to_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    places: dict[str, Line] = {}
    for line in RAYWGEN:
        path, params = parsed(line)
        if path not in SCHEMAS or path == "cluster render" or str(params.get("config", "")).startswith("runs/"):
            continue
        out = settings(path, params).out
        assert out in _GOES_ON or out not in places, f"{line} writes to {out}, as {places[out]} does"
        places[out] = line


def test_what_is_read_is_made_by_a_command_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = {"runs/demo/igpg", "runs/demo/corpus"}
    for line in RAYWGEN:
        path, params = parsed(line)
        if path.startswith("corpus"):
            made |= {value for value in params.values() if isinstance(value, str) and value.startswith("runs/")}
        if path.startswith("corpus") or path not in SCHEMAS or path in ("cluster render", "tune"):
            continue
        if str(params.get("config", "")).startswith("runs/"):
            continue
        config = settings(path, params)
        needed = [getattr(config, name, "") for name in ("corpus", "generator")]
        for place in [each for each in needed if isinstance(each, str) and each.startswith("runs/")]:
            assert place in made, f"{line} reads {place}, which no command before it makes"
        made.add(config.out)


@pytest.mark.parametrize("line", BENCHES, ids=str)
def test_a_benchmark_is_there(line: Line) -> None:
    assert line.words[2] in BENCHMARKS


@pytest.mark.parametrize("block", blocks("python"))
def test_python_parses_and_finds_what_it_imports(block: str) -> None:
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_parses(block: str) -> None:
    assert isinstance(yaml.safe_load(block), dict)


def test_files_of_the_clone_that_it_names_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"\b(?:configs|jobs)/[\w/-]+\.(?:yaml|txt|py)\b", text)) - {"jobs/NAME.py"}:
        assert (ROOT / name).is_file(), name


def test_its_example_of_samples_and_a_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raywgen.tasks.runnable import runnable
    from raywgen.tasks.user_data import read_data

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (block,) = [block for block in blocks("python") if "mynets.py" in block]
    exec(compile(block, "README.md", "exec"), {})
    data = read_data("examples.npz")
    runs, samples = runnable(importlib.import_module("mynets").MyNet(), [data.x], 2)
    assert runs(samples).shape == (64, 2)
