"""Files of a search that decide what is done: damage is named with the file and the remedy."""

from __future__ import annotations

import re
from pathlib import Path

from raywgen.config import ConfigError
from raywgen.tuning.results import TrialState
from raywgen.tuning.search import LOG, SearchLog


def flips(content: bytes) -> list[bytes]:
    """With one bit changed, at places all over."""
    found = []
    for place in range(0, len(content) - 1, max(1, len(content) // 40)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        found.append(bytes(damaged))
    return found


def test_the_state_of_a_trial(tmp_path: Path) -> None:
    state = TrialState(trial="007", knobs={"rate": 0.1, "width": 64})
    state.save(tmp_path)
    assert TrialState.load(tmp_path) == state
    path = tmp_path / "trial.json"
    whole, refusals = path.read_bytes(), []
    for content in (b"", whole[:-10], *flips(whole)):
        path.write_bytes(content)
        try:
            found = TrialState.load(tmp_path)
        except ConfigError as error:
            refusals.append(str(error))
        else:
            assert found == state, content
    assert len(refusals) > 20
    for message in refusals:
        assert re.search(rf"{path} is damaged .*; delete it and run the same command", message)


def test_the_log_of_a_search(tmp_path: Path) -> None:
    log = SearchLog(str(tmp_path))
    log.write({"event": "suggest", "trial": "000", "knobs": {"rate": 0.25}})
    log.write({"event": "report", "trial": "000", "score": 0.5})
    assert SearchLog(str(tmp_path)).events == log.events
    whole, refusals = (tmp_path / LOG).read_bytes(), []
    for content in flips(whole):
        (tmp_path / LOG).write_bytes(content)
        try:
            found = SearchLog(str(tmp_path)).events
        except ConfigError as error:
            refusals.append(str(error))
        else:
            # A changed space says the same, and a last line without its end was cut off by a kill.
            assert found == log.events[: len(found)]
            assert len(found) == content.count(b"\n")
    assert len(refusals) > 20
    for message in refusals:
        assert re.search(rf"{LOG}, line \d, is damaged .*; restore the file from a copy, or give another out", message)
