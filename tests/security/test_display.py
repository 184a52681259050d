"""Names that data gives are shown as they are: no markup, no link, no code that moves the cursor."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from raywgen.cli import app, settings
from raywgen.cli.settings import out, print_networks
from raywgen.corpus import Corpus
from raywgen.generation import NetworkRow
from raywgen.progress import Reporter, plain
from tests.security.hostile import change_json

HOSTILE = "[link=http://e.vil][bold]net[/bold][/link]\x1b]0;owned\x07\u202e"
SHOWN = r"[link=http://e.vil][bold]net[/bold][/link]\x1b]0;owned\x07\u202e"


def console() -> Console:
    return Console(file=io.StringIO(), width=400, force_terminal=True, color_system=None)


def said(found: Console) -> str:
    assert isinstance(found.file, io.StringIO)
    return found.file.getvalue()


def test_a_text_from_elsewhere_is_shown_as_it_is() -> None:
    shown = console()
    shown.print(plain(HOSTILE), highlight=False)
    assert said(shown) == f"{SHOWN}\n"
    assert plain("naïve — Bäume\n2") == "naïve — Bäume\n2"


def test_names_of_networks_and_tasks_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "out", console())
    row = NetworkRow(
        network=HOSTILE, task=HOSTILE, draw=0, instruction="", known=True, log_prob=None, example_loss=1.0,
        test_accuracy=1.0, path=HOSTILE,
    )  # fmt: skip
    print_networks([row])
    assert said(settings.out).count("[link=http://e.vil]") == 2
    assert "\x1b]0;" not in said(settings.out)


def test_a_step_names_what_it_works_on_as_it_is() -> None:
    shown = Console(file=io.StringIO(), width=400)
    with Reporter(shown).step("corpus", HOSTILE) as bar:
        bar.named(1, 1, HOSTILE)
        bar.say(HOSTILE)
    assert said(shown).count(SHOWN) == 3


def test_a_corpus_of_somebody_else_is_listed_as_it_is(zoo_corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(zoo_corpus.location, tmp_path / "corpus")
    change_json(tmp_path / "corpus" / "manifest.json", lambda content: content["networks"][0].update(name=HOSTILE))
    found = CliRunner().invoke(app, ["corpus", "info", str(tmp_path / "corpus")])
    assert found.exit_code == 0
    assert "[bold]" in found.output
    assert "\x1b]0;" not in found.output


def test_no_text_becomes_a_picture() -> None:
    for console in (out, Reporter().console):
        with console.capture() as shown:
            console.print(plain("lora:x: 24"))
        assert shown.get() == "lora:x: 24\n"
