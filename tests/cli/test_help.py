"""Help that fits a screen, without torch and without a name that is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from raywgen.cli import app, help_page
from raywgen.cli.known_settings import PATH, SCHEMAS, settings_of_command, settings_of_method
from raywgen.cli.write_settings import collect
from raywgen.generators.method_names import METHOD_NAMES

COLUMNS, LINES = 100, 40


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    yield " ".join(path)
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


PAGES = [*commands(typer.main.get_command(app)), *(f"train {name}" for name in METHOD_NAMES), "train mcdi/heads"]


def shown(arguments: str, monkeypatch: pytest.MonkeyPatch, columns: int = COLUMNS) -> str:
    monkeypatch.setattr(help_page.out, "_width", columns)
    done = CliRunner().invoke(app, arguments.split(), env={"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_a_screen(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(f"{page} --help", monkeypatch).splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert shown(f"{page} -h", monkeypatch).splitlines() == lines


@pytest.mark.parametrize("path", SCHEMAS)
def test_the_main_settings_are_those_of_the_command_and_all_are_behind(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [setting.key for setting in settings_of_command(path)]
    assert set(help_page.MAIN.get(path, ())) <= set(known)
    short = shown(f"{path} --help", monkeypatch, columns=60)
    assert all(f"   {key} " in short for key in help_page.MAIN.get(path, known)), "no name is cut, whatever the width"
    whole = shown(f"{path} --help-all", monkeypatch, columns=60).partition("settings, given as key=value:")[2]
    # Names stand at the margin, their texts five columns to the right of it.
    named = [line[1:].partition("=")[0] for line in whole.splitlines() if line[:1] == " " and line[1:2].strip()]
    assert named == known


def test_meanings_are_legible_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown("train mcdi --help", monkeypatch, columns=80).splitlines()
    (place,) = (index for index, line in enumerate(lines) if line.startswith("   generator.denoiser.num_steps "))
    assert lines[place + 1].strip() == "Optimiser steps; 0 switches the stage off."
    assert max(len(line.rstrip()) for line in lines[place:]) <= 80


def test_a_method_shows_its_own_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("mcdi", "method=mcdi", "mcdi/heads"):
        page = shown(f"train {form} --help", monkeypatch)
        assert "generator.denoiser.optimizer.learning_rate" in page
        assert "generator.prior" not in page
        assert "generator.policy" not in page
    whole = shown("train mcdi --help-all", monkeypatch)
    assert all(f" {setting.key}=" in whole for setting in settings_of_method("mcdi"))
    assert "generator.prior" not in whole


def test_the_file_of_settings_is_what_the_classes_say() -> None:
    expected = json.loads(json.dumps(collect()))
    assert json.loads(PATH.read_text()) == expected, "write it anew by `python -m raywgen.cli.write_settings`"


def test_python_m_raywgen_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "raywgen", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("raywgen ")
    assert "torch " in done.stdout


@pytest.mark.parametrize(("words", "completed"), [("raywgen tra", "train"), ("raywgen corpus ver", "verify")])
def test_a_shell_completes_commands(words: str, completed: str) -> None:
    code = "import sys; from raywgen.cli import main; sys.argv = ['raywgen']; main()"
    asked = {"_RAYWGEN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | asked
    )
    assert completed in done.stdout.split()
