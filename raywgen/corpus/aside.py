"""Entries that an ingest finds and does not take, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

REFUSED = "refused"
PASSED_OVER = "passed over"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """One entry that does not come into the corpus.

    Attributes:
        checkpoint_id: The id that it would have had.
        file: Path or URI of its file.
        reason: The reason why it is not taken, and the remedy.
        kind: `refused` is a checkpoint that should have come in; `passed over` is something else, such as an
            optimizer's state or a file of another format.
    """

    checkpoint_id: str
    file: str
    reason: str
    kind: str = REFUSED

    def to_row(self) -> dict[str, str]:
        """Returns the row of the quarantine table."""
        return {"checkpoint_id": self.checkpoint_id, "file": self.file, "reason": self.reason, "kind": self.kind}


def is_refused(row: Mapping[str, str | None]) -> bool:
    """Whether a row is about a checkpoint that should have come in; rows of older corpora all are."""
    return row.get("kind") != PASSED_OVER


def in_one_line(row: Mapping[str, str | None]) -> str:
    """Joins file and reason, without naming the file twice."""
    file, reason = row["file"] or "", row["reason"] or ""
    return f"{file}: {reason.removeprefix(file).lstrip(': ')}"


def counts_by_reason(rows: Iterable[Mapping[str, str | None]]) -> list[tuple[str, int]]:
    """Counts rows by reason, without the names of files and tensors, the most frequent first."""
    counts: Counter[str] = Counter()
    for row in rows:
        reason = (row["reason"] or "").replace(row["file"] or " ", "").strip(": ")
        named = re.sub(r"'[^']*'", "'...'", reason.partition(";")[0])
        counts[f"{row.get('kind') or REFUSED}: {named}"] += 1
    return counts.most_common()
