"""A whole run on a second device: batches, checkpoints, a resumption, bundles; see `tests.second_device`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.config import merge_config
from raywgen.corpus import Corpus
from raywgen.generators.bundle import load_bundle
from raywgen.nn.devices import DeviceError, resolved_device
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.devices import with_device
from tests.second_device import DEVICE, SecondDevice

_STAGE: dict[str, Any] = {"num_steps": 2, "batch_size": 4, "optimizer": {"ema_decay": 0.5}}
_GENERATOR = {
    "network": {"width": 16, "num_layers": 1, "num_heads": 2},
    "denoiser": _STAGE,
    "task_loss": _STAGE,
    "diffusion": {"num_targets": 2},
}


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("raywgen.training.workers.resolved_device", lambda name: DEVICE)
    with SecondDevice():
        yield


def run(corpus: Corpus, out: Path) -> TrainConfig:
    settings = {"method": "mcdi", "generator": _GENERATOR, "log_every": 1, "validate_every": 1, "num_workers": 0}
    settings |= {"corpus": corpus.location, "out": str(out), "num_condition_samples": 8, "num_query_samples": 8}
    return merge_config(TrainConfig, [("run", settings)])


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.usefixtures("one_thread")
def test_a_run_is_trained_on_the_device_that_it_is_given(
    zoo_corpus: Corpus, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    launch([run(zoo_corpus, tmp_path / "here")])
    request.getfixturevalue("second")
    launch([run(zoo_corpus, tmp_path / "there")], stop_at=0.5)
    launch([run(zoo_corpus, tmp_path / "there")])
    here, there = (read_metrics(tmp_path / name) for name in ("here", "there"))
    assert len(here) == 4
    for name in ("loss", "val_loss"):
        assert [row[name] for row in there] == pytest.approx([row[name] for row in here], rel=1e-4)
    expected = load_bundle(tmp_path / "here" / "generator").state_dict()
    found = load_bundle(tmp_path / "there" / "generator").state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-4) for name, tensor in expected.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_one_line(zoo_corpus: Corpus, tmp_path: Path) -> None:
    assert resolved_device("auto") == resolved_device("cpu") == torch.device("cpu")
    config = run(zoo_corpus, tmp_path)
    config.device = "cuda"
    with pytest.raises(DeviceError, match=r"^device=cuda: torch .*; give device=auto or device=cpu"):
        launch([config])
    assert not list(tmp_path.iterdir())


def test_a_run_says_which_device_it_took(
    zoo_corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("raywgen.training.launcher"), "train_here", lambda specs, stop: None)
    launch([run(zoo_corpus, tmp_path)])
    assert f"{tmp_path} trains on the CPU" in capfd.readouterr().err or torch.cuda.is_available()


def test_workers_take_gpus_where_each_can_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, device in ((2, "cuda"), (1, "cpu")):
        monkeypatch.setattr("raywgen.training.devices.num_gpus", lambda found=found: found)
        assert with_device(TrainConfig(num_workers=2)).device == device
        assert with_device(TrainConfig(num_workers=2, device="cpu")).device == "cpu"
