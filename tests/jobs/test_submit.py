"""`ray start --head`, then `ray job submit` of the shipped scripts, as a user of a cluster does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import raywgen
from raywgen.corpus import Corpus
from tests.jobs.conftest import ROOT, SMALL, LocalCluster

pytestmark = pytest.mark.slow


def submit(cluster: LocalCluster, *command: str) -> subprocess.CompletedProcess[str]:
    return cluster.run("ray", "job", "submit", "--working-dir", str(ROOT), "--", *command)


def test_training_and_generation_as_jobs(one_node: LocalCluster, zoo_corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "igpg"
    where = [f"corpus={zoo_corpus.location}", f"out={out}"]
    train = ("python", "jobs/train.py", "configs/igpg/digits.yaml", *where, "zero_stage=2", *SMALL)
    done = submit(one_node, *train)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert raywgen.load(out).generator.method == "igpg"
    written = submit(
        one_node,
        *("python", "jobs/generate.py", f"generator={out}", f"corpus={zoo_corpus.location}"),
        *(f"out={tmp_path / 'networks'}", "best_of=2", "limit=1"),
    )
    assert written.returncode == 0, written.stdout + written.stderr
    assert len(list((tmp_path / "networks").glob("*.safetensors"))) == 2
    built = submit(
        one_node, "python", "jobs/build_corpus.py", str(tmp_path / "built"), "--from", str(tmp_path / "networks")
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert Corpus.open(tmp_path / "built").facts.num_rows == 2


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
