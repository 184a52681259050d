"""Every kind of page in a real browser, at the width of a desktop and of a phone, light and dark."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from raywgen.evaluation.report import write_report
from raywgen.tuning.report import PAGES
from tests.evaluation.report.builders import make_finetune, make_networks, make_run, make_training
from tests.tuning.test_report import make_search

BROWSER = Path(__file__).with_name("browser.py")
IS_THERE = all(importlib.util.find_spec(name) for name in ("PyQt6", "axe_playwright_python"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A page of every kind."""
    root = tmp_path_factory.mktemp("pages")
    makers = {"evaluation": make_run, "training": make_training, "finetune": make_finetune, "networks": make_networks}
    written = [write_report(make(root / name)) for name, make in makers.items()]
    search = root / "search"
    search.mkdir()
    written.append(write_report(make_search(search), PAGES))
    return [Path(page) for page in written]


@pytest.mark.slow
@pytest.mark.skipif(not IS_THERE, reason="needs a browser and axe-core: pip install 'raywgen[browser]'")
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_pages_fit_and_read_well(pages: list[Path], tmp_path: Path, colours: str) -> None:
    """Nothing scrolls sideways, nothing is said on the console, and axe-core finds nothing at all."""
    command = [sys.executable, str(BROWSER), str(tmp_path), colours, *map(str, pages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(pages)
    for page in found:
        where = page["page"], page["width"]
        assert page["loaded"], where
        assert page["dark"] == (colours == "dark"), where
        assert page["inner_width"] == page["width"], where
        assert page["scroll_width"] <= page["inner_width"], where
        assert page["console"] == [], where
        assert page["violations"] == [], where
