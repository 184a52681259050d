"""`ray start --head`, then `ray job submit` of the shipped scripts, as a user of a cluster does."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

import raywgen
from raywgen.corpus import Corpus
from tests.jobs.conftest import ROOT, SMALL, LocalCluster

pytestmark = pytest.mark.slow


def submit(cluster: LocalCluster, *command: str) -> subprocess.CompletedProcess[str]:
    return cluster.run("ray", "job", "submit", "--working-dir", str(ROOT), "--", *command)


def test_training_and_generation_as_a_job(one_node: LocalCluster, zoo_corpus: Corpus, tmp_path: Path) -> None:
    """Three scripts, one after another in one job, each of which takes what the one before wrote."""
    out, networks, built = tmp_path / "igpg", tmp_path / "networks", tmp_path / "built"
    corpus = f"corpus={zoo_corpus.location}"
    scripts = [
        ("jobs/train.py", "configs/igpg/digits.yaml", corpus, f"out={out}", "zero_stage=2", *SMALL),
        ("jobs/generate.py", f"generator={out}", corpus, f"out={networks}", "best_of=2", "limit=1"),
        ("jobs/build_corpus.py", str(built), "--from", str(networks)),
    ]
    done = submit(one_node, "bash", "-c", " && ".join(shlex.join(("python", *script)) for script in scripts))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert raywgen.load(out).generator.method == "igpg"
    assert len(list(networks.glob("*.safetensors"))) == 2
    assert Corpus.open(built).facts.num_rows == 2


@pytest.mark.parametrize("working_dir", [str(ROOT), f"local://{ROOT}"])
def test_code_comes_from_the_working_directory(one_node: LocalCluster, working_dir: str) -> None:
    """Sent, or lying where every node sees it, as for a RayJob."""
    script = "import os, raywgen; print(os.path.relpath(raywgen.__file__))"
    done = one_node.run("ray", "job", "submit", "--working-dir", working_dir, "--", "python", "-c", script)
    assert "raywgen/__init__.py" in done.stdout.splitlines(), done.stdout + done.stderr


def test_a_mistake_is_one_clear_line_and_a_failed_job(one_node: LocalCluster, tmp_path: Path) -> None:
    command = ("jobs/train.py", "configs/igpg/digits.yaml", f"out={tmp_path}", "sed=1")
    plain = one_node.run("python", *command)
    (line,) = plain.stderr.splitlines()
    assert plain.returncode == 1
    assert line.startswith("error: unknown key 'sed'")
    assert "did you mean 'seed'?" in line
    done = submit(one_node, "python", *command)
    assert done.returncode == 1
    assert line in done.stdout.splitlines()
    assert "exit code 1" in done.stdout
    assert "Traceback" not in done.stdout
