"""The bytes that a run is said to write, against the files that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.corpus import Corpus
from raywgen.generators.bundle import build_generator
from raywgen.training import TrainConfig, launch
from raywgen.training.checkpoints import CheckpointManager, TrainState
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.run_bytes import least_run_bytes
from tests.builders import igpg_config

pytestmark = pytest.mark.usefixtures("one_thread")


def weights_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix not in (".json", ".jsonl", ".yaml"))


@pytest.mark.parametrize(("keep_newest", "ema_decay", "stop_at"), [(1, 0.0, 1.0), (3, 0.9, 1.0), (2, 0.0, 0.5)])
def test_a_run_never_holds_less_at_its_peak_than_is_asked_for_and_little_more(
    zoo_corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep_newest: int,
    ema_decay: float,
    stop_at: float,
) -> None:
    generator = igpg_config()
    for stage in (generator.tokenizer, generator.prior, generator.task_loss):
        stage.num_steps, stage.optimizer.ema_decay = 8, ema_decay
    config = TrainConfig(
        generator=generator,
        corpus=zoo_corpus.location,
        out=str(tmp_path / "run"),
        num_workers=0,
        checkpoint_every=4,
        keep_newest=keep_newest,
    )
    peaks = []
    prune = CheckpointManager._prune

    def measured(self: CheckpointManager, state: TrainState) -> None:
        peaks.append(weights_on_disk(tmp_path / "run"))
        prune(self, state)

    monkeypatch.setattr(CheckpointManager, "_prune", measured)
    launch([config], stop_at=stop_at)
    peaks.append(weights_on_disk(tmp_path / "run"))
    built = build_generator("igpg", generator, measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0)
    least = least_run_bytes(built, config, stop_at)
    assert least <= max(peaks) < 1.5 * least
