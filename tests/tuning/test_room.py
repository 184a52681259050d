"""Searches whose disk has no room, and those of which nobody can say so before they run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raywgen.corpus import Corpus
from raywgen.out_folder import OutError
from raywgen.tuning.pipeline import Pipeline
from raywgen.tuning.room import check_search_room
from tests.tuning.builders import RATE, SPACE, tune_config


def check(corpus: Corpus, out: Path, **changes: Any) -> None:
    config = tune_config(corpus, out, num_trials=2000, **changes)
    check_search_room(Pipeline(config), config)


def test_trials_are_counted_where_their_size_and_number_are_known(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = {"space": {RATE: SPACE[RATE]}}
    check(zoo_corpus, tmp_path, **rate)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 << 20))
    with pytest.raises(OutError, match=r"MiB for 2000 trials, and its disk has 2\.0 MiB left"):
        check(zoo_corpus, tmp_path, **rate)
    check(zoo_corpus, tmp_path)  # The space chooses the width, so trials may be smaller than the base.
    check(zoo_corpus, tmp_path, max_steps=100, **rate)
