"""Joins the rows of a table of facts to checkpoints, and reports the rows that could not be used."""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from raywgen.corpus.facts import FactValue
from raywgen.corpus.facts_file import FactsRow
from raywgen.corpus.sources import SourceCheckpoint
from raywgen.json_types import JsonObject

_INDEX = ".index.json"
_SHOWN_NAMES = 4
_KEPT_PROBLEMS = 1_000


@dataclass(slots=True)
class FactsReport:
    """A report on the rows of a table of facts.

    Attributes:
        num_rows: Number of rows of the table.
        num_used: Number of rows whose facts went to at least one checkpoint.
        problems: One sentence for each row that fits nothing or is ambiguous, and for each contradiction.
    """

    num_rows: int = 0
    num_used: int = 0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> JsonObject:
        """Returns the JSON object of the manifest."""
        kept = self.problems[:_KEPT_PROBLEMS]
        return {"rows": self.num_rows, "used": self.num_used, "num_problems": len(self.problems), "problems": kept}


def join_facts(
    rows: Sequence[FactsRow], checkpoints: Sequence[SourceCheckpoint]
) -> tuple[list[SourceCheckpoint], FactsReport]:
    """Gives each checkpoint the facts of the rows that name it.

    A row's path is first taken literally: a checkpoint's name, its file (absolute, or any end of its path, with or
    without suffix), or a folder that holds one checkpoint. If that finds nothing, it is taken as a pattern. Rows that
    name a checkpoint override patterns; of several the later one counts.

    Args:
        rows: Rows from `read_facts`.
        checkpoints: The checkpoints of the sources.

    Returns:
        The checkpoints with their facts, and a report on the rows.
    """
    report = FactsReport(num_rows=len(rows))
    if not rows:
        return list(checkpoints), report
    places = _Places(checkpoints)
    exact: list[tuple[FactsRow, list[int]]] = []
    patterns: list[tuple[FactsRow, list[int]]] = []
    for row in rows:
        found = places.literally(row.path) if row.path else []
        is_pattern = not found and any(sign in row.path for sign in "*?[")
        if is_pattern:
            found = places.by_pattern(row.path)
        if not found:
            what = f"'{row.path}' fits no checkpoint" if row.path else "names no path"
            report.problems.append(f"row {row.number}: {what}; its facts are not used")
        elif is_pattern:
            patterns.append((row, found))
        elif len(found) > 1:
            names = [checkpoints[index].name for index in found]
            report.problems.append(
                f"row {row.number}: '{row.path}' fits {len(names)} checkpoints ({_listed(names)}); its facts are not "
                "used: write more of the path, or a pattern for all of them"
            )
        else:
            exact.append((row, found))
    report.num_used = len(exact) + len(patterns)
    by_checkpoint = _JoinedFacts(checkpoints, report)
    by_checkpoint.add(patterns, by_pattern=True)
    by_checkpoint.add(exact, by_pattern=False)
    joined = [
        replace(checkpoint, facts=checkpoint.facts | facts)
        for checkpoint, facts in zip(checkpoints, by_checkpoint.facts, strict=True)
    ]
    return joined, report


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")


class _JoinedFacts:
    """Collects facts by checkpoint, with the row that each comes from."""

    def __init__(self, checkpoints: Sequence[SourceCheckpoint], report: FactsReport) -> None:
        self.facts: list[dict[str, FactValue]] = [{} for _ in checkpoints]
        self._from: list[dict[str, tuple[int, int, bool]]] = [{} for _ in checkpoints]
        self._checkpoints = checkpoints
        self._report = report

    def add(self, rows: Sequence[tuple[FactsRow, list[int]]], *, by_pattern: bool) -> None:
        for row, found in rows:
            for index in found:
                for name, value in row.facts.items():
                    self._add(index, name, value, (row.number, len(found), by_pattern))

    def _add(self, index: int, name: str, value: FactValue, source: tuple[int, int, bool]) -> None:
        before, earlier = self._from[index].get(name), self.facts[index].get(name)
        if before is not None and earlier != value and not (earlier != earlier and value != value):
            number, num_found, by_pattern = before
            # A narrower pattern may correct an earlier wider one, and a name may correct any pattern.
            if by_pattern == source[2] and (not by_pattern or num_found <= source[1]):
                self._report.problems.append(
                    f"rows {number} and {source[0]} say {name}={earlier} and {name}={value} of "
                    f"'{self._checkpoints[index].name}'; the later one counts"
                )
        self.facts[index][name] = value
        self._from[index][name] = source


class _Places:
    """Finds checkpoints by the names and paths that users write."""

    def __init__(self, checkpoints: Sequence[SourceCheckpoint]) -> None:
        self._names = {_normal(checkpoint.name): index for index, checkpoint in enumerate(checkpoints)}
        self._locations = [_locations(checkpoint) for checkpoint in checkpoints]
        self._ends: dict[int, dict[str, list[int]]] = {}
        self._folder_ends: dict[int, dict[str, list[int]]] = {}

    def literally(self, path: str) -> list[int]:
        """Returns the checkpoints that a path names: several if it is ambiguous."""
        forms = list(_forms(path))
        for form in forms:
            if form in self._names:
                return [self._names[form]]
            if found := self._ends_of(form).get(form):
                return found
        return next((found for form in forms if (found := self._folders_of(form).get(form))), [])

    def by_pattern(self, path: str) -> list[int]:
        """Returns the checkpoints of which any name matches a shell pattern."""
        for form in dict.fromkeys([path, path.replace("\\", "/")]):
            matches = re.compile(fnmatch.translate(_normal(form))).match
            if found := [index for index, places in enumerate(self._locations) if any(map(matches, places))]:
                return found
        return []

    def _ends_of(self, form: str) -> dict[str, list[int]]:
        length = form.count("/") + 1
        if length not in self._ends:
            self._ends[length] = _by_end(self._locations, length)
        return self._ends[length]

    def _folders_of(self, form: str) -> dict[str, list[int]]:
        length = form.count("/") + 1
        if length not in self._folder_ends:
            folders = [
                tuple({place.rsplit("/", up)[0] for place in places for up in range(1, place.count("/") + 1)})
                for places in self._locations
            ]
            self._folder_ends[length] = _by_end(folders, length)
        return self._folder_ends[length]


def _by_end(locations: Sequence[tuple[str, ...]], length: int) -> dict[str, list[int]]:
    """Indexes checkpoints by the last parts of their paths."""
    ends: dict[str, list[int]] = {}
    for index, places in enumerate(locations):
        for end in {"/".join(place.split("/")[-length:]) for place in places if place.count("/") + 1 >= length}:
            ends.setdefault(end, []).append(index)
    return ends


def _locations(checkpoint: SourceCheckpoint) -> tuple[str, ...]:
    """Returns the paths by which a checkpoint may be named, with and without suffix."""
    name = PurePosixPath(checkpoint.name)
    places = {checkpoint.name}
    if checkpoint.stored_id is None:
        files = [file.partition("?")[0] if "://" in file else file for file in checkpoint.files]
        suffix = PurePosixPath(files[0]).suffix
        for file in files:
            folder, _, last = file.rpartition("/")
            places |= {file, f"{folder}/{name.name}", f"{folder}/{name.name}{suffix}", str(name.with_name(last))}
    return tuple({_normal(place) for place in places})


def _forms(path: str) -> Iterator[str]:
    """Yields a path as it is written, then in the spellings of other systems."""
    seen: set[str] = set()
    for form in (path, path.strip(), path.strip().replace("\\", "/"), os.path.expanduser(path.strip())):
        form = form.removesuffix(_INDEX)
        while form.startswith("./"):
            form = form[2:]
        for one in (form, form.rstrip("/"), os.path.abspath(form) if "://" not in form else form):
            one = _normal(one)
            if one and one not in seen:
                seen.add(one)
                yield one


def _normal(path: str) -> str:
    """Normalises letters that have two encodings, such as é."""
    return unicodedata.normalize("NFC", path)
