from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raywgen.corpus import Corpus


def raywgen(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raywgen", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180)


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One clear error, no traceback, a failing exit status."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    text = " ".join(done.stderr.split())
    for part in parts:
        assert part in text, text


@pytest.fixture
def copy(zoo_corpus: Corpus, tmp_path: Path) -> Path:
    """A corpus that may be damaged."""
    target = tmp_path / "corpus"
    shutil.copytree(zoo_corpus.location, target)
    return target


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        ("demo", "igpg.task_loss.num_steps"),
        ("zoo train", "num_seen_tasks"),
        ("encoder train", "validate_every"),
        ("train", "zero_stage"),
        ("generate", "best_of"),
        ("evaluate", "finetune_epochs"),
    ],
)
def test_help_lists_the_settings(command: str, setting: str) -> None:
    done = raywgen(*command.split(), "--help-all")
    assert done.returncode == 0
    assert f" {setting}=" in done.stdout
    assert "settings, given as key=value" in done.stdout


@pytest.mark.parametrize("form", ["{}", "method={}"])
def test_help_lists_the_settings_of_a_method_of_the_users_own(form: str) -> None:
    done = raywgen("train", form.format("tests.generators.own:Own"), "--help")
    assert done.returncode == 0
    shown = "".join(done.stdout.replace("│", " ").split())
    assert "generator.only.num_steps" in shown
    assert "generator.tokenizer" not in shown


def test_help_names_a_method_that_is_not_there() -> None:
    refused(raywgen("train", "tests.generators.own:Owm", "--help"), "did you mean 'tests.generators.own:Own'?")


def test_an_unknown_key_names_the_nearest() -> None:
    refused(raywgen("train", "sed=1"), "unknown key 'sed'", "did you mean 'seed'?")


def test_a_wrong_value_is_named() -> None:
    refused(raywgen("train", "zero_stage=7"), "zero_stage=7")
    refused(raywgen("zoo", "train", "num_seen_tasks=many"), "num_seen_tasks")


def test_a_missing_config_or_corpus_is_named(tmp_path: Path) -> None:
    refused(raywgen("train", str(tmp_path / "none.yaml")), "none.yaml")
    refused(raywgen("corpus", "info", str(tmp_path)), "manifest.json", "raywgen zoo train")
    refused(raywgen("generate", f"generator={tmp_path}"), f"{tmp_path} holds no trained generator")


def test_info_as_json(zoo_corpus: Corpus) -> None:
    done = raywgen("corpus", "info", zoo_corpus.location, "--json")
    assert json.loads(done.stdout)["checkpoints"] == zoo_corpus.facts.num_rows


def test_verify_names_damage_and_the_checkpoints_it_costs(copy: Path) -> None:
    assert raywgen("corpus", "verify", str(copy)).returncode == 0
    shard = next(iter(sorted((copy / "weights").glob("*-unseen-*.arrow"))))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = raywgen("corpus", "verify", str(copy))
    assert done.returncode == 1
    assert shard.name in done.stdout
    assert "holds mlp-" in done.stdout


def test_training_on_a_truncated_or_missing_shard_stops_at_once_and_keeps_what_was_there(
    copy: Path, tmp_path: Path
) -> None:
    shard = next(iter(sorted((copy / "weights").glob("*-train-*.arrow"))))
    out = tmp_path / "run"
    out.mkdir()
    (out / "kept.txt").write_text("an earlier result")
    shard.write_bytes(shard.read_bytes()[:1000])
    refused(raywgen("train", f"corpus={copy}", f"out={out}", "num_workers=0"), shard.name, "corpus verify")
    shard.unlink()
    refused(raywgen("train", f"corpus={copy}", f"out={out}", "num_workers=0"), shard.name, "is missing")
    assert (out / "kept.txt").read_text() == "an earlier result"
    assert [path.name for path in out.iterdir()] == ["kept.txt"]


def test_a_run_folder_of_another_config_is_left_alone(zoo_corpus: Corpus, tmp_path: Path) -> None:
    common = [f"corpus={zoo_corpus.location}", f"out={tmp_path / 'run'}", "num_workers=0", "method=hypernetwork"]
    first = raywgen("train", *common, "generator.task_loss.num_steps=2", "generator.width=16")
    assert first.returncode == 0, first.stderr
    weights = (tmp_path / "run" / "generator" / "generator.safetensors").read_bytes()
    refused(raywgen("train", *common, "generator.task_loss.num_steps=3", "generator.width=16"), "another config")
    assert (tmp_path / "run" / "generator" / "generator.safetensors").read_bytes() == weights
