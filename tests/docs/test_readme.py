"""README is short, and everything that it points to is there."""

from __future__ import annotations

import re

import yaml

from tests.docs.pages import ROOT, blocks, text_of

README = text_of("README.md")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_its_links_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        targets = re.findall(r"\]\(([^)#]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", text_of(page))
        found = [one for pair in targets for one in pair if one and "://" not in one]
        assert found
        assert [target for target in found if not (ROOT / target).exists()] == []


def test_its_two_commands_install_and_run() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    install = "python3 -m venv .venv && .venv/bin/pip install -q -c configs/constraints-cpu.txt -e"
    assert commands[:2] == [f"{install} . && .venv/bin/raywgen demo", f"{install} '.[test]' && .venv/bin/pytest"]


def test_its_example_is_the_one_of_index_and_quickstart() -> None:
    (example,) = [block.text for block in blocks("python") if block.page == "README.md"]
    for page in ("docs/index.md", "docs/quickstart.md"):
        assert example in text_of(page)


def test_the_citation_is_of_this_version() -> None:
    import raywgen

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == raywgen.__version__
