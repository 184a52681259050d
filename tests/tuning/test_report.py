from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.config import ConfigError, save_config
from raywgen.evaluation.report import write_report
from raywgen.tuning import TuneConfig, TuneError
from raywgen.tuning.importance import importance
from raywgen.tuning.live import short_names, trials_table
from raywgen.tuning.plots import best_so_far
from raywgen.tuning.report import PAGES
from raywgen.tuning.results import TrialState, best_row, read_table, row_of, write_table
from raywgen.tuning.space import parse_space
from raywgen.tuning.tensorboard import write_tensorboard
from tests.tuning.builders import row

SPACE = {
    "train.a": {"uniform": [0, 1]},
    "train.b": {"choice": ["x", "a longer value"]},
    "train.c": {"loguniform": [1e-4, 1e-1], "when": {"train.b": "x"}},
}
KNOBS = parse_space(SPACE)
ROWS = [
    row("000", [0.5, 0.6, 0.7], "done", **{"train.a": 0.1, "train.b": "x", "train.c": 1e-3}),
    row("001", [0.4], **{"train.a": 0.9, "train.b": "a longer value"}),
    row("002", [0.6, 0.7, 0.9], "done", **{"train.a": 0.2, "train.b": "x", "train.c": 1e-2}),
    row("003", [0.95], **{"train.a": 0.3, "train.b": "x", "train.c": 2e-2}),
    row("004", [0.0], "failed", **{"train.a": 0.4, "train.b": "x", "train.c": 2e-2}),
    row("005", [0.7, 0.6, 0.8], "done", **{"train.a": 0.25, "train.b": "a longer value"}),
]


def make_search(folder: Path) -> Path:
    """Makes what a search of these trials leaves."""
    save_config(TuneConfig(zoo="digits", space=SPACE, out=str(folder)), folder / "config.yaml")
    write_table(ROWS, str(folder))
    return folder


def test_the_best_is_of_those_that_went_furthest() -> None:
    assert best_row(ROWS).trial == "002"
    assert best_row(ROWS[3:4]).trial == "003"
    # What counts is where a trial ended, not the best that it ever was.
    fallen = row("006", [0.5, 0.99, 0.6], "done", **{"train.a": 0.1, "train.b": "x", "train.c": 1e-3})
    assert best_row([ROWS[0], fallen]).trial == "000"
    with pytest.raises(TuneError, match="no trial could be judged"):
        best_row(ROWS[4:5])


def test_the_curve_counts_the_steps_of_all_and_the_scores_of_whole_trials() -> None:
    assert best_so_far(ROWS, 3) == [(30, 0.7), (40, 0.7), (70, 0.9), (80, 0.9), (90, 0.9), (120, 0.9)]


def test_a_trial_that_is_over_before_its_end_was_stopped_or_has_failed() -> None:
    state = TrialState(trial="000", knobs={})
    assert row_of(state, 3, is_over=False).status == "unfinished"
    assert row_of(state, 3, is_over=True).status == "failed"
    judged = TrialState(trial="000", knobs={}, scores=ROWS[1].scores)
    assert row_of(judged, 3, is_over=True).status == "stopped"
    assert row_of(judged, 1, is_over=False).status == "done"
    assert row_of(TrialState(trial="000", knobs={}, failed="no"), 3, is_over=True).reason == "no"


@pytest.mark.parametrize("width", [40, 200])
def test_the_table_of_trials_shows_every_value_at_any_width(width: int) -> None:
    table = trials_table(ROWS, 3, Console(width=width))
    assert [column.header for column in table.columns][4:] == (["values"] if width == 40 else ["a", "b", "c"])
    text = "\n".join(str(cell) for column in table.columns for cell in column.cells)
    assert "a longer value" in text
    assert "0.001" in text


def test_importance_finds_the_knob_that_matters() -> None:
    rows = [
        row(
            f"{i:03d}",
            [0.5 + 0.4 * (i % 2)],
            **{"train.a": (i * 7 % 20) / 20, "train.b": ["x", "a longer value"][i % 2]},
        )
        for i in range(20)
    ]
    found = importance(rows, KNOBS)
    assert found is not None
    assert (found.rung, found.num_trials) == (1, 20)
    assert list(found.shares) == ["train.b", "train.a"]
    assert found.shares["train.b"] > 0.9
    assert sum(found.shares.values()) == pytest.approx(1)
    assert importance(rows[:3], KNOBS) is None
    assert importance(rows[::2], KNOBS) is None, "all scores are one"


def test_importance_compares_scores_of_one_rung() -> None:
    """Trials that went further are better because they were trained longer."""
    rows = [
        row(
            f"{i:03d}",
            [0.5 + 0.2 * (i % 2), *([0.1 * (i // 2)] if i < 10 else [])],
            **{"train.a": i / 20, "train.b": ["x", "a longer value"][i % 2]},
        )
        for i in range(20)
    ]
    found = importance(rows, KNOBS)
    assert found is not None
    assert found.rung == 1
    assert found.shares["train.b"] > 0.9


def test_short_names_tell_keys_apart() -> None:
    keys = ["train.generator.prior.width", "train.generator.tokenizer.width", "train.seed"]
    assert list(short_names(keys).values()) == ["prior.width", "tokenizer.width", "seed"]
    assert short_names(["a.b", "b"]) == {"a.b": "a.b", "b": "b"}


def test_the_report_holds_every_trial_and_every_knob(tmp_path: Path) -> None:
    html = Path(write_report(make_search(tmp_path), PAGES)).read_text()
    assert "Best: trial 002" in html
    assert "90.0 % accuracy on validation tasks" in html
    for trial in ("000", "001", "002", "003", "004", "005"):
        assert f'<th scope="row">{trial}' in html
    for knob in KNOBS:
        assert f"<code>{knob.key}</code>" in html
    assert "where b is x" in html
    assert "Share of the spread" in html
    assert "over 5 trials at rung 1 of 3" in html
    assert not re.search(r'(src|href)="(https?:)?//', html), "the page must ask the network for nothing"
    assert "mathdefault" not in html


def test_the_command_draws_the_page_on_what_the_folder_holds(tmp_path: Path) -> None:
    drawn = Path(write_report(make_search(tmp_path), PAGES)).read_text()
    assert read_table(str(tmp_path)) == ROWS
    (tmp_path / "report.html").unlink()
    shown = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.split() == ["page:", f"{tmp_path}/report.html"]
    written = re.compile("Written by raywgen on .*")
    assert written.sub("", (tmp_path / "report.html").read_text()) == written.sub("", drawn)


@pytest.mark.parametrize("damage", ["{", '{"trial": "000"}', ""])
def test_a_damaged_table_is_named_with_the_remedy(tmp_path: Path, damage: str) -> None:
    make_search(tmp_path)
    (tmp_path / "trials.jsonl").write_text(damage)
    with pytest.raises((ConfigError, TuneError), match=r"trials\.jsonl cannot be read .*writes it|no trial"):
        write_report(tmp_path, PAGES)


def test_tensorboard_has_hyperparameters_and_curves(tmp_path: Path) -> None:
    write_tensorboard(ROWS[:4], str(tmp_path))
    before = sorted(tmp_path.rglob("events*"))
    write_tensorboard(ROWS[:4], str(tmp_path))
    assert sorted(tmp_path.rglob("events*")) == before
    events = EventAccumulator(str(tmp_path / "tensorboard" / "002"))
    events.Reload()
    read = plugin_data_pb2.HParamsPluginData.FromString  # pyright: ignore[reportAttributeAccessIssue]
    contents = [read(content) for content in events.PluginTagToContent("hparams").values()]
    started = next(one for one in contents if one.HasField("session_start_info")).session_start_info.hparams
    assert (started["train.a"].number_value, started["train.b"].string_value) == (0.2, "x")
    assert [(point.step, round(point.value, 3)) for point in events.Scalars("score")] == [
        (10, 0.6),
        (20, 0.7),
        (30, 0.9),
    ]
