"""Runs whose folder lies in an object store: the same files, resumption and status as on a disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from raywgen import mirror
from raywgen.config import save_config
from raywgen.corpus import Corpus
from raywgen.generators.bundle import load_bundle
from raywgen.locks import LOCK
from raywgen.out_folder import OutError
from raywgen.storage import Storage
from raywgen.training import TrainConfig, launch, read_metrics, read_stages
from raywgen.training.runlog import METRICS, RunLog
from raywgen.training.status import run_status
from raywgen.training.stop_file import STOP, StopFile
from tests.training.test_resume import losses, small_config

# Another number of threads rounds otherwise, and losses are compared to the last bit.
pytestmark = pytest.mark.usefixtures("one_thread")


def in_store(corpus: Corpus, out: str) -> TrainConfig:
    config = small_config(corpus, Path())
    config.out = out
    return config


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def compared(files: list[str]) -> list[str]:
    """The files without locks, and without those of TensorBoard, which are named by time and process."""
    return [name for name in files if name != LOCK and not name.startswith("tensorboard/")]


def check_equal(out: str, local: Path) -> None:
    found, expected = load_bundle(f"{out}/generator").state_dict(), load_bundle(local / "generator").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(local) == losses(out)


def test_a_run_in_a_store_is_the_run_on_a_disk_also_after_a_kill(
    zoo_corpus: Corpus, bucket: str, tmp_path: Path
) -> None:
    launch([small_config(zoo_corpus, tmp_path / "whole")])
    config = in_store(zoo_corpus, f"{bucket}/run")
    save_config(config, tmp_path / "config.yaml")
    killed(["train", str(tmp_path / "config.yaml")], config.out)
    under_way = run_status(config.out)
    assert not under_way.done
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith("s3:")]
    launch([config])
    storage = Storage.at(config.out)
    assert compared(storage.walk()) == compared(names(tmp_path / "whole"))
    assert [name for name in storage.walk() if name.startswith("tensorboard/")]
    check_equal(config.out, tmp_path / "whole")
    assert read_stages(config.out) == read_stages(tmp_path / "whole")
    lines = run_status(config.out).lines()
    assert lines[:2] == [f"{config.out}: igpg, done", "stages trained: tokenizer, prior, task_loss"]
    written = storage.modified("config.yaml")
    launch([config])
    assert storage.modified("config.yaml") == written, "a trained generator is left as it is"


def killed(command: list[str], out: str) -> None:
    """Kills a command when its run has a checkpoint of its second stage."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen([sys.executable, "-m", "raywgen", *command], env=environment)
    storage = Storage.at(out)
    while process.poll() is None:
        if any(name.startswith("checkpoints/01-") for name in storage.walk("checkpoints")):
            process.kill()
        time.sleep(0.02)
    assert process.returncode == -signal.SIGKILL


def test_what_cannot_be_written_to_is_refused_before_anything_is_trained(
    zoo_corpus: Corpus, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out, message in {
        "s3://missing/run": "there is no such bucket",
        "s4://bucket/run": "no URI of those that can be written to",
        "": "out is empty",
        ".": "is the current folder",
    }.items():
        with pytest.raises(OutError, match=message):
            launch([in_store(zoo_corpus, out)])
    assert not list(tmp_path.iterdir())
    assert not Storage.at(bucket).walk()


def test_the_log_is_copied_while_it_is_written(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "LEAST_SECONDS", 0.05)
    out = f"{bucket}/run"
    log = RunLog(out, {})
    log.write("a", 0, {"loss": 1.0})
    until = time.monotonic() + 30
    while not read_metrics(out) and time.monotonic() < until:
        time.sleep(0.05)
    assert [row["step"] for row in read_metrics(out)] == [0]
    log.write("a", 1, {"loss": 0.5})
    log.close()
    assert [row["step"] for row in read_metrics(out)] == [0, 1]
    log = RunLog(out, {"a": 1})
    log.write("a", 1, {"loss": 0.25})
    log.close()
    assert [row["loss"] for row in read_metrics(out)] == [1.0, 0.25]


def test_a_store_that_fails_for_a_while_does_not_stop_the_log(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "LEAST_SECONDS", 0.05)
    out, failures = f"{bucket}/run", 0
    upload = Storage.upload

    def fail(storage: Storage, local: str | Path, relative: str, last: str = "") -> None:
        nonlocal failures
        failures += 1
        if failures < 4:
            raise OSError("no answer")
        upload(storage, local, relative, last)

    monkeypatch.setattr(Storage, "upload", fail)
    log = RunLog(out, {})
    log.write("a", 0, {"loss": 1.0})
    until = time.monotonic() + 30
    while Storage.at(out).size(METRICS) is None and time.monotonic() < until:
        time.sleep(0.05)
    log.close()
    assert failures >= 4
    assert [row["step"] for row in read_metrics(out)] == [0]


def test_workers_are_asked_to_stop_by_a_file_in_the_store(bucket: str) -> None:
    out = f"{bucket}/run"
    driver, worker = StopFile(out), StopFile(out)
    assert not worker.asked()
    driver.ask()
    assert Storage.at(out).exists(STOP)
    until = time.monotonic() + 30
    while not worker.asked() and time.monotonic() < until:
        time.sleep(0.05)
    assert worker.asked()
    driver.withdraw()
    assert not StopFile(out).asked()
    assert not Storage.at(out).exists(STOP)


@pytest.mark.slow
def test_workers_train_into_a_store(zoo_corpus: Corpus, bucket: str, tmp_path: Path) -> None:
    config = in_store(zoo_corpus, f"{bucket}/run")
    config.num_workers, config.checkpoint_every = 2, 3
    save_config(config, tmp_path / "config.yaml")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "raywgen", "train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    status = run_status(config.out)
    assert status.done
    assert (status.finished, status.starts[-1].workers) == (["tokenizer", "prior", "task_loss"], 2)
    storage = Storage.at(config.out)
    assert any(name.startswith("ray_train/") for name in storage.walk())
    assert not storage.exists(STOP)
    assert load_bundle(f"{config.out}/generator").method == "igpg"
