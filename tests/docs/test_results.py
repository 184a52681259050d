"""The records of results are whole, and the figures of README and index are theirs."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest

from docs.hooks.record_pages import number, records_of, rendered, with_records
from raywgen.benchmarks.run import BENCHMARKS
from tests.docs.pages import DOCS, ROOT, text_of

RESULTS = DOCS / "results"
RECORDS = sorted(RESULTS.glob("*.json"))
PAGES = {path.stem: records_of(path.read_text()) for path in sorted(RESULTS.glob("*.md"))}


def content(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_how_its_figures_were_taken(path: Any) -> None:
    record = json.loads(path.read_text())
    assert record["benchmark"] in BENCHMARKS
    assert record["command"].startswith(f"python jobs/benchmark.py {record['benchmark']}")
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", record["commit"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"])
    assert record["machine"]
    assert record["figures"] or record["tables"]
    for table in record.get("tables", ()):
        assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["caption"]
    assert record["command"].split()[2] in rendered(record, path.name)


def test_every_record_is_shown_on_the_page_of_its_benchmark() -> None:
    for path in RECORDS:
        assert path.stem in PAGES[content(path.stem)["benchmark"]], path.name


def test_every_page_shows_records_that_are_there() -> None:
    for page, names in PAGES.items():
        assert page == "index" or names, page
        assert all((RESULTS / f"{name}.json").is_file() for name in names), page


def test_pages_hold_what_their_records_hold() -> None:
    old = [path.name for path in RESULTS.glob("*.md") if with_records(path.read_text()) != path.read_text()]
    assert old == [], "python docs/hooks/record_pages.py writes them anew"


def test_transcribed_figures_stood_in_the_readme_of_their_commit() -> None:
    """Where the clone has its history; a part of each table is compared, since some tables were joined."""
    for path in RECORDS:
        record = content(path.stem)
        if not record["transcribed"]:
            continue
        shown = subprocess.run(
            ["git", "-C", str(ROOT), "show", f"{record['commit']}:README.md"],
            capture_output=True,
            text=True,
            check=False,
        )
        if shown.returncode:
            pytest.skip("the clone has no history")
        cells = [cell for table in record["tables"] for row in table["rows"] for cell in row[1:]]
        figures = {figure for cell in cells for figure in re.findall(r"\d+\.\d+", cell)}
        there = {figure for figure in figures if figure in shown.stdout}
        assert len(there) >= len(figures) / 2, (path.name, sorted(figures - there))


def test_tables_beside_a_benchmark_s_own_figures_hold_these() -> None:
    num = 0
    for path in RECORDS:
        record = content(path.stem)
        for table in [] if record["transcribed"] else record.get("tables", ()):
            places = [place for place, name in enumerate(table["columns"]) if re.match("accuracy|ms", name)]
            shown = [row[place].partition(" ")[0] for row in table["rows"] for place in places if row[place]]
            for cell in shown:
                digits = len(cell.partition(".")[2])
                assert cell in {f"{value:.{digits}f}" for value in record["figures"].values()}, (path.name, cell)
            num += len(shown)
    assert num > 40


def test_a_record_as_a_benchmark_writes_it_becomes_a_table() -> None:
    record = {
        "benchmark": "plan",
        "command": "python jobs/benchmark.py plan 'methods=[mcdi, lohp]'",
        "commit": "0" * 40 + "+changes",
        "date": "2026-01-02",
        "machine": {"cpu": "a processor", "cores": 2, "gpus": [], "python": "3.11", "torch": "2.6"},
        "transcribed": False,
        "figures": {"ratio": 1.23456, "count": 1234567.0},
        "conditions": {"sizes": [1, 2], "note": "a | b"},
    }
    text = rendered(record, "plan.json")
    assert "| `ratio` | 1.235 |" in text
    assert "| `count` | 1,234,567 |" in text
    assert "`0000000000` with changes" in text
    assert "a processor, 2 cores, no GPU; torch 2.6" in text
    assert "a \\| b" in text
    assert "'methods=[mcdi, lohp]'" in text
    in_words = rendered(
        record | {"tables": [{"caption": "", "columns": ["", "is"], "rows": [["a", "1.2"]]}]}, "plan.json"
    )
    assert "| a | 1.2 |" in in_words
    assert "`ratio`" not in in_words
    assert "as the benchmark wrote it" not in in_words


def test_a_new_place_before_one_that_is_written_takes_nothing_from_it() -> None:
    place = "<!-- record chaos -->"
    once = with_records(place)
    assert once.endswith("<!-- end -->")
    assert with_records(f"{place}\n\nbetween\n\n{once}") == f"{once}\n\nbetween\n\n{once}"


def test_a_page_is_told_how_a_missing_record_is_made(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"benchmark\.py NAME record="):
        with_records("<!-- record none -->", tmp_path)


@pytest.mark.parametrize(
    ("value", "shown"), [(3.0, "3"), (0.00012345, "0.0001234"), (12.3456, "12.35"), (5e20, "5e+20")]
)
def test_figures_are_shown_with_four_digits(value: float, shown: str) -> None:
    assert number(value) == shown


FIGURE = re.compile(r"\d+\.\d+(?: ± \d+\.\d+)?")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/quickstart.md"])
def test_figures_beside_a_link_to_results_are_those_of_its_records(page: str) -> None:
    """With their spread, where it is given, or as the page shows them; lines that name several pages are left out."""
    num = 0
    for line in text_of(page).splitlines():
        names = set(re.findall(r"results/([\w-]+)\.md", line))
        if len(names) == 1:
            texts = [(RESULTS / f"{one}.json").read_text() for one in PAGES[names.pop()]]
            cells = " ".join(
                [*texts, *(number(value) for text in texts for value in json.loads(text)["figures"].values())]
            )
            shown = FIGURE.findall(re.sub(r"\]\(.*?\)", "", line))
            recorded = FIGURE.findall(cells)
            assert set(shown) <= {*recorded, *(figure.partition(" ")[0] for figure in recorded)}, line
            num += len(shown)
    assert num or page != "README.md"
