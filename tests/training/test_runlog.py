from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raywgen.training.runlog import METRICS, TENSORBOARD, RunLog, read_metrics


def test_rows_and_tensorboard_hold_the_same_scalars(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {})
    for step in range(3):
        log.write("prior", step, {"loss": 1.0 / (step + 1)}, {"input_wait": 0.5})
    log.close()
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 0.5, 1 / 3]
    assert [row["perf"] for row in read_metrics(tmp_path)] == [{"input_wait": 0.5}] * 3
    events = EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()
    assert [event.step for event in events.Scalars("prior/loss")] == [0, 1, 2]
    assert [event.value for event in events.Scalars("prior/perf/input_wait")] == [0.5] * 3


def test_a_torn_last_row_is_skipped(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"stage": "prior", "step": 0, "time": 1.0}\n{"stage": "pri')
    assert len(read_metrics(tmp_path)) == 1


def test_a_resumed_log_drops_what_will_be_written_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {})
    for stage in ("tokenizer", "prior"):
        for step in range(4):
            log.write(stage, step, {"loss": 0.0})
    log.close()
    RunLog(tmp_path, {"tokenizer": 10**9, "prior": 2}).close()
    assert [(row["stage"], row["step"]) for row in read_metrics(tmp_path)] == [
        *(("tokenizer", step) for step in range(4)),
        ("prior", 0),
        ("prior", 1),
    ]


def test_rows_of_a_stage_that_is_trained_again_from_its_beginning_are_dropped(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {})
    log.write("a", 0, {"loss": 1.0})
    log.write("b", 0, {"loss": 2.0})
    log.close()
    RunLog(tmp_path, {"a": 1}).close()
    assert [row["stage"] for row in read_metrics(tmp_path)] == ["a"]
