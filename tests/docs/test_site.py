"""The generated parts of the site: formulas, settings, the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from docs.hooks.example_page import example_page
from docs.hooks.reference_pages import reference_pages, with_lists, with_reference
from raywgen.benchmarks.run import BENCHMARKS
from raywgen.cli import app
from raywgen.cli.settings import SCHEMAS
from raywgen.config_help import describe
from raywgen.evaluation import rows
from raywgen.generators import METHODS, method
from raywgen.tasks.networks.registry import NETWORKS
from raywgen.training import TrainConfig
from tests.docs.pages import DOCS, ROOT


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference_pages()


def test_every_setting_of_every_command_and_method_is_on_its_page(pages: dict[str, str]) -> None:
    train = pages["reference/configuration/train.md"]
    assert all(f"`{setting.key}`" in train for setting in describe(TrainConfig))
    for name in METHODS:
        text = pages[f"reference/configuration/method-{name}.md"]
        assert all(f"| `{setting.key}` |" in text for setting in describe(method(name).Config, "generator."))
    assert {f"reference/configuration/{path.replace(' ', '-')}.md" for path in SCHEMAS} <= set(pages)


def test_a_setting_without_help_or_with_a_bar_keeps_its_table_whole(pages: dict[str, str]) -> None:
    for text in pages.values():
        for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
            assert len(re.findall(r"(?<!\\)\|", row)) in (3, 4), row


def test_every_command_is_on_the_page_of_commands(pages: dict[str, str]) -> None:
    text = pages["reference/command-line.md"]

    def commands(command: object, path: str) -> list[str]:
        inner = getattr(command, "commands", None)
        return [path] if inner is None else [one for name in inner for one in commands(inner[name], f"{path} {name}")]

    found = commands(typer.main.get_command(app), "raywgen")
    assert len(found) > 25
    assert all(f"## {path}\n" in text for path in found)
    assert "--facts" in text


def test_generated_pages_are_in_the_table_of_contents(pages: dict[str, str]) -> None:
    nav = with_reference([{"Reference": [{"Configuration": ["reference/configuration/index.md"]}]}])
    shown = str(nav)
    assert all(place in shown for place in pages if place.startswith("reference/configuration/"))


def test_every_row_of_the_ladder_is_explained() -> None:
    page = (DOCS / "guides/evaluating.md").read_text()
    names = [name.replace("{}", "N") for name, *_ in (*rows._LADDER, *rows._OTHERS)]
    assert len(names) > 12
    assert [name for name in names if f"`{name}`" not in page] == []


def test_networks_are_listed_where_a_page_asks_for_them() -> None:
    shown = with_lists((DOCS / "extending/network.md").read_text(), [])
    assert all(f"| `{name}` | " in shown for name in NETWORKS)
    assert "|  |" not in shown


def test_every_benchmark_has_a_page_or_is_listed_as_one_that_has_none() -> None:
    pages = [path.stem for path in (DOCS / "results").glob("*.md")]
    index = with_lists((DOCS / "results/index.md").read_text(), pages)
    assert all(f"]({name}.md)" in index if name in pages else f"| `{name}` | " in index for name in BENCHMARKS)


def test_every_example_is_shown_with_what_it_says_of_itself(tmp_path: Path) -> None:
    shown = example_page()
    assert all(f"## {path.stem}\n" in shown for path in (ROOT / "examples").glob("*.py"))
    (tmp_path / "one.py").write_text(
        '"""Shows this.\n\nIt is short.\n\n    python one.py\n"""\n\nprint(1)\n\nprint(2)\n'
    )
    one = example_page(tmp_path)
    assert "Shows this.\n\nIt is short.\n\n    python one.py\n" in one
    assert "    ```python\n    print(1)\n\n    print(2)\n    ```" in one


def test_formulas_become_mathml_that_keeps_its_source() -> None:
    latex2mathml = pytest.importorskip("latex2mathml")
    assert latex2mathml
    from docs.hooks.mathml import with_mathml

    shown = with_mathml(
        r'<p>a <span class="arithmatex">\(x &lt; y\)</span></p><div class="arithmatex">\[\sqrt{z}\]</div>'
    )
    assert shown.count("<math ") == 2
    assert 'alttext="x &lt; y"' in shown
    assert "<msqrt>" in shown
    assert 'display="block"' in shown
    assert "arithmatex" not in shown


def test_every_formula_of_the_site_is_taken() -> None:
    converter = pytest.importorskip("latex2mathml.converter")
    num = 0
    for path in DOCS.rglob("*.md"):
        for formula in re.findall(r"^\$\$\n(.*?)\n\$\$", path.read_text(), re.MULTILINE | re.DOTALL):
            shown = converter.convert(formula, display="block")
            # What the converter does not know it writes as text.
            assert "\\" not in re.sub(r"<[^>]*>", "", shown), (path.name, formula)
            num += 1
    assert num > 15


def test_pages_need_nothing_from_a_network() -> None:
    for path in [*DOCS.rglob("*.svg"), *DOCS.rglob("*.css"), ROOT / "mkdocs.yml"]:
        text = re.sub(r'xmlns="[^"]*"', "", path.read_text())
        assert "http" not in text, path.name
