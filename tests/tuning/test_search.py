"""The search without Ray's processes: what it knew, cut off anywhere, is what it knows again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from raywgen.config import ConfigError
from raywgen.tuning import TuneConfig
from raywgen.tuning.search import LOG, RecordedASHA, RecordedSearch, SearchLog
from raywgen.tuning.space import parse_space
from raywgen.tuning.trial import rung_time

SPACE = parse_space({"train.seed": {"int": [0, 99]}, "train.x": {"uniform": [0, 1]}})


def config(out: Path, **changes: Any) -> TuneConfig:
    return TuneConfig(**({"out": str(out), "num_trials": 12, "seed": 3} | changes))


class Killed(Exception):  # noqa: N818
    pass


def drive(settings: TuneConfig, most_events: int | None = None) -> list[dict[str, Any]]:
    """One trial at a time as Ray does it, with the result of a closed form; killed after some events."""
    log = SearchLog(settings.out)
    write = log.write

    def write_or_die(event: dict[str, Any]) -> None:
        if most_events is not None and len(log.events) >= most_events:
            raise Killed
        write(event)

    log.write = write_or_die  # pyright: ignore[reportAttributeAccessIssue]
    search, scheduler = RecordedSearch(settings, SPACE, log), RecordedASHA(settings, log)
    for index in range(100):
        suggested = search.suggest(f"ray-{index}")
        if suggested == Searcher.FINISHED:
            break
        trial = SimpleNamespace(config=suggested, trial_id=f"ray-{index}")
        scheduler.on_trial_add(None, trial)
        values = suggested["knobs"]
        for rung in range(1, 4):
            score = 1 - (values["train.x"] - 0.3) ** 2 - values["train.seed"] / 1000 + rung / 100
            result = {"score": score, "rung": rung, "time": rung_time(rung, settings), "steps": 10 * rung}
            if scheduler.on_trial_result(None, trial, result) == "STOP":
                scheduler.on_trial_complete(None, trial, result)
                search.on_trial_complete(f"ray-{index}", result)
                break
            search.on_trial_result(f"ray-{index}", result)
    return SearchLog(settings.out).events


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_a_search_killed_at_any_event_goes_on_as_if_it_had_not_been(tmp_path: Path, search: str) -> None:
    whole = drive(config(tmp_path, search=search))
    assert len([event for event in whole if event["event"] == "suggest"]) == 12
    assert any(event["event"] == "complete" and event["rung"] < 3 for event in whole), "ASHA stops none"
    assert any(event["event"] == "complete" and event["rung"] == 3 for event in whole)
    for cut in range(0, len(whole), 5):
        (tmp_path / LOG).unlink()
        with pytest.raises(Killed):
            drive(config(tmp_path, search=search), most_events=cut)
        # Killed a second time, with a line cut off in the middle.
        with pytest.raises(Killed):
            drive(config(tmp_path, search=search), most_events=min(cut + 2, len(whole) - 1))
        with (tmp_path / LOG).open("a") as file:
            file.write('{"event": "sugg')
        assert drive(config(tmp_path, search=search)) == whole


def test_more_trials_go_on_beyond_the_end(tmp_path: Path) -> None:
    first = drive(config(tmp_path, num_trials=7))
    assert drive(config(tmp_path))[: len(first)] == first
    (tmp_path / "whole").mkdir()
    assert drive(config(tmp_path)) == drive(config(tmp_path / "whole"))


def test_no_trial_begins_once_the_steps_are_spent(tmp_path: Path) -> None:
    events = drive(config(tmp_path, max_steps=70))
    ends = [event["steps"] for event in events if event["event"] == "complete"]
    assert sum(ends[:-1]) < 70 <= sum(ends)


def test_a_log_of_another_search_is_refused(tmp_path: Path) -> None:
    drive(config(tmp_path, num_trials=2))
    with pytest.raises(ConfigError, match="trial 000 would have other values now"):
        drive(config(tmp_path, seed=4))
