"""Writes benchmarks' records, JSON files of `python jobs/benchmark.py NAME record=docs/results`, into pages of results.

A page asks for one by `<!-- record NAME -->`; what is written stands between this line and `<!-- end -->`. The site is
built with the newest, and `python docs/hooks/record_pages.py` writes it into the files, for those who read them there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
_MOST_CELL = 400
_PLACE = re.compile(r"^<!-- record ([\w.-]+) -->$(?:(?:(?!^<!-- record ).)*?^<!-- end -->$)?", re.MULTILINE | re.DOTALL)


def with_records(markdown: str, folder: Path = RESULTS) -> str:
    """Returns a page with what the records of a folder hold at the places where it asks for them."""

    def written(found: re.Match[str]) -> str:
        text = rendered(read_record(folder, found[1]), f"{found[1]}.json")
        return f"<!-- record {found[1]} -->\n\n{text}\n\n<!-- end -->"

    return _PLACE.sub(written, markdown)


def records_of(markdown: str) -> list[str]:
    """Lists the names of the records that a page shows."""
    return _PLACE.findall(markdown)


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """Reads a record.

    Raises:
        FileNotFoundError: There is none of that name; the message says how one is made.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such record; `python jobs/benchmark.py NAME record={path}` makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def rendered(record: Mapping[str, Any], file: str) -> str:
    """Returns the command, its tables, and how they were taken.

    Figures that tables show in words are in the file alone.

    Args:
        record: The content of the file.
        file: Its name, for the link beside the table.
    """
    parts = [f"```bash\n{_wrapped(record['command'])}\n```"]
    for table in record.get("tables", ()):
        if table["caption"]:
            parts.append(f"**{table['caption']}**")
        parts.append(_table(table["columns"], table["rows"], "record-figures"))
    if record["figures"] and not record.get("tables"):
        rows = [(f"`{name}`", number(value)) for name, value in record["figures"].items()]
        parts.append(_table(("figure", "value"), rows, "record-figures"))
    parts.append(_table(("taken", ""), [*_conditions(record["conditions"]), *_origin(record, file)], "record-origin"))
    return "\n\n".join(parts)


def number(value: float) -> str:
    """Returns a figure with four significant digits, and a whole number as it is."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _origin(record: Mapping[str, Any], file: str) -> list[tuple[str, str]]:
    machine = record["machine"]
    if record["transcribed"]:
        where = machine["description"]
        source = f"[{file}]({file}), transcribed from the README of that commit"
    else:
        gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ", no GPU"
        where = f"{machine['cpu']}, {machine['cores']} cores{gpus}; torch {machine['torch']}"
        source = f"[{file}]({file}), " + ("with all figures" if record.get("tables") else "as the benchmark wrote it")
    commit, changes = record["commit"].partition("+")[::2]
    shown = f"`{commit[:10]}`" + (" with changes" if changes else "") if commit else "not in a clone"
    return [("commit", shown), ("date", record["date"]), ("machine", where), ("file", source)]


def _conditions(conditions: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the conditions that fit a table; results of each seed and the like stand in the file."""
    cells = [(name, _cell(value)) for name, value in conditions.items()]
    left_out = [name for name, cell in cells if len(cell) > _MOST_CELL]
    shown = [(name, cell) for name, cell in cells if len(cell) <= _MOST_CELL]
    return [*shown, ("in the file alone", ", ".join(left_out))] if left_out else shown


def _cell(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
    return f'<div class="{name}" markdown>\n\n' + "\n".join(lines) + "\n\n</div>"


def _wrapped(command: str) -> str:
    """Cuts a long command between its arguments, as a shell takes it."""
    lines, line = [], ""
    for word in re.findall(r"(?:'[^']*'|\S)+", command):
        if line and len(line) + len(word) > 88:
            lines.append(line)
            line = f"  {word}"
        else:
            line = f"{line} {word}".strip() if not line.startswith("  ") else f"{line} {word}"
    return " \\\n".join([*lines, line])


if __name__ == "__main__":
    for page in RESULTS.glob("*.md"):
        page.write_text(with_records(page.read_text(encoding="utf-8")), encoding="utf-8")
