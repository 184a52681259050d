"""A real `raywgen train` that gets a signal to end keeps a checkpoint and says so; the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raywgen.config import save_config
from raywgen.corpus import Corpus
from raywgen.generators.igpg import IGPGConfig
from raywgen.training import TrainConfig, launch, read_metrics
from tests.builders import settings_of
from tests.training.test_resume import losses, small_config

# Another number of threads rounds otherwise, and losses are compared to the last bit.
pytestmark = pytest.mark.usefixtures("one_thread")


def slow_config(corpus: Corpus, out: Path, num_workers: int) -> TrainConfig:
    """Many small steps, and no checkpoint is due before the end of a stage."""
    config = small_config(corpus, out, checkpoint_every=10_000, num_workers=num_workers, validate_every=1000)
    settings = settings_of(config, IGPGConfig)
    settings.tokenizer.num_steps = 4
    settings.prior.num_steps = 400
    settings.prior.dropout = 0.0  # Each worker draws its own.
    settings.task_loss.num_steps = 0
    return config


def command(config: TrainConfig, path: Path) -> list[str]:
    save_config(config, path)
    return [sys.executable, "-m", "raywgen", "train", str(path)]


def stopped_by(number: signal.Signals, config: TrainConfig, path: Path) -> str:
    """What a run says that is sent a signal while it trains the prior."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        command(config, path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    while process.poll() is None:
        if any(row["stage"] == "prior" and row["step"] >= 5 for row in read_metrics(config.out)):
            break
        time.sleep(0.02)
    process.send_signal(number)
    _, output = process.communicate(timeout=300)
    assert process.returncode == 128 + number, output
    return output


def check(output: str, config: TrainConfig, name: str, whole: Path, tolerance: float) -> None:
    (line,) = [line for line in output.splitlines() if line.startswith("stopped by")]
    assert "Traceback" not in output
    found = re.fullmatch(
        rf"stopped by {name}: {config.out} keeps a checkpoint at step (\d+) of stage 'prior'; the same command goes on "
        "from there",
        line,
    )
    assert found
    before = losses(Path(config.out))
    # A row is written before the checkpoint of its step.
    assert int(found[1]) == max(step for stage, step, _ in before if stage == "prior") + 1
    launch([small_end(config)])
    after = losses(Path(config.out))
    assert before.items() <= after.items()
    wanted = losses(whole)
    assert after.keys() == wanted.keys()
    for key, loss in wanted.items():
        assert after[key] == pytest.approx(loss, rel=tolerance, abs=tolerance / 10), key


def small_end(config: TrainConfig) -> TrainConfig:
    """The rest in this process."""
    config.num_workers = 0
    return config


@pytest.fixture(scope="module")
def whole(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    out = tmp_path_factory.mktemp("whole")
    launch([slow_config(zoo_corpus, out, 0)])
    return out


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_training_in_one_process(
    number: signal.Signals, name: str, zoo_corpus: Corpus, tmp_path: Path, whole: Path
) -> None:
    config = slow_config(zoo_corpus, tmp_path / "run", 0)
    check(stopped_by(number, config, tmp_path / "run.yaml"), config, name, whole, tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_training_on_ray_workers(
    number: signal.Signals, name: str, zoo_corpus: Corpus, tmp_path: Path, whole: Path
) -> None:
    config = slow_config(zoo_corpus, tmp_path / "run", 2)
    check(stopped_by(number, config, tmp_path / "run.yaml"), config, name, whole, tolerance=0.05)
