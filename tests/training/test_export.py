"""A run's checkpoints become generators, tensor by tensor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.generators.bundle import load_bundle
from raywgen.generators.igpg import IGPGConfig
from raywgen.storage import Storage
from raywgen.training import launch, snapshot_folder
from raywgen.training.checkpoints import CheckpointError, CheckpointWarning
from raywgen.training.export_run import ExportConfig, export_run
from tests.builders import settings_of
from tests.training.test_resume import averaged_config, small_config

WEIGHTS = "generator.safetensors"


@pytest.fixture(scope="module")
def run(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps averages and stopped after half of its last stage, with all of its checkpoints."""
    config = averaged_config(zoo_corpus, tmp_path_factory.mktemp("run"))
    config.keep_newest = 100
    launch([config], stop_at=0.5)
    return Path(config.out)


def same(one: str | Path, other: str | Path) -> bool:
    mine, theirs = load_file(Path(one) / WEIGHTS), load_file(Path(other) / WEIGHTS)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_newest_checkpoint_is_exported_with_its_averages(run: Path) -> None:
    folder = export_run(str(run), ExportConfig())
    assert folder == str(run / "exports" / "02-000000003")
    assert same(folder, snapshot_folder(run, 0.5))
    plain = load_file(run / "checkpoints" / "02-000000003" / "part-00000-of-00001.safetensors")
    found = load_file(Path(folder) / WEIGHTS)
    assert any(not torch.equal(found[name].flatten(), plain[name]) for name in plain if name.startswith("model."))
    generator = load_bundle(folder)
    assert generator.method == "igpg"
    assert not (run / "generator").exists(), "an export does not end a run"


def test_a_stage_is_exported_as_it_was_at_its_end(run: Path, tmp_path: Path) -> None:
    for stage in ("tokenizer", "prior"):
        folder = export_run(str(run), ExportConfig(stage=stage, out=str(tmp_path / stage)))
        assert same(folder, run / "stages" / stage)
    for checkpoint in ("01-000000000", "02-000000000"):
        folder = export_run(str(run), ExportConfig(checkpoint=checkpoint, out=str(tmp_path / checkpoint)))
        assert same(folder, run / "stages" / ("tokenizer" if checkpoint[1] == "1" else "prior"))


def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    part = tmp_path / "run" / "checkpoints" / "02-000000003" / "part-00000-of-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.warns(CheckpointWarning, match=r"passed over: .*is damaged"):
        folder = export_run(str(tmp_path / "run"), ExportConfig())
    assert folder.endswith("02-000000002")
    with pytest.raises(CheckpointError, match="is damaged"):
        export_run(str(tmp_path / "run"), ExportConfig(checkpoint="02-000000003"))
    with pytest.raises(ConfigError, match=r"stage=x: .* has the stages tokenizer, prior, task_loss"):
        export_run(str(tmp_path / "run"), ExportConfig(stage="x"))
    with pytest.raises(ValueError, match="not both"):
        ExportConfig(stage="prior", checkpoint="02-000000003")


def test_a_run_in_an_object_store_is_exported_there(run: Path, bucket: str) -> None:
    Storage.at(bucket).upload(run, "run")
    folder = export_run(f"{bucket}/run", ExportConfig())
    assert folder == f"{bucket}/run/exports/02-000000003"
    mine, theirs = load_bundle(folder).state_dict(), load_bundle(snapshot_folder(str(run), 0.5)).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_it_is_a_command(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raywgen", "export", str(run), f"out={tmp_path}/mine"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/mine holds the generator\n"
    assert same(tmp_path / "mine", snapshot_folder(run, 0.5))


def test_a_run_killed_between_a_checkpoint_and_its_bundle_writes_the_bundle(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(zoo_corpus, tmp_path / "run")
    settings_of(config, IGPGConfig).task_loss.num_steps = 0

    def killed(*arguments: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("raywgen.training.trainer.save_bundle", killed)
        with pytest.raises(InterruptedError):
            launch([config])
    assert not (tmp_path / "run" / "stages").exists()
    launch([config])
    assert {path.name for path in (tmp_path / "run" / "stages").iterdir()} == {"tokenizer", "prior"}
    assert same(tmp_path / "run" / "stages" / "prior", tmp_path / "run" / "generator")
