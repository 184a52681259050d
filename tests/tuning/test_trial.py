"""What ends a trial: the reason is kept in its state, and the search goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raywgen.corpus import Corpus
from raywgen.training import DeviceMemoryError
from raywgen.tuning import trial
from raywgen.tuning.pipeline import Pipeline
from raywgen.tuning.results import TrialState, trial_folder
from tests.tuning.builders import RATE, WIDTH, tune_config


def test_a_device_without_memory_ends_a_trial_in_one_line(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DeviceMemoryError("stage 'task_loss' has no memory left with 4 networks at a time")

    monkeypatch.setattr(trial, "launch", fail)
    config = tune_config(zoo_corpus, tmp_path)
    state = TrialState(trial="t-0", knobs={RATE: 1e-3, WIDTH: 8})
    Path(trial_folder(config.out, state.trial)).mkdir(parents=True)
    ended = trial._climb(state, 1, config, Pipeline(config))
    assert ended.failed == "stage 'task_loss' has no memory left with 4 networks at a time"
    assert ended.scores[-1].score == 0.0
