"""What needs no torch does not wait for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import sys
import raywgen.cli
sys.argv = ["raywgen", *sys.argv[1:]]
try:
    raywgen.cli.main()
except SystemExit:
    pass
print("imported:", *(name for name in ("torch", "deepspeed", "sklearn") if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--help", "Train a generator"),
        ("job --help", "Submit a job"),
        ("job submit --help", "working-dir"),
        ("cluster --help", "Write KubeRay manifests"),
        ("zoo list", "digits"),
        ("job list --address http://127.0.0.1:1", "no Ray cluster answers"),
        ("--version", "torch 2"),
        ("train mcdi --help", "generator.denoiser.num_steps"),
        ("generate --help-all", "piece_values"),
        ("status nowhere", "nowhere holds no run"),
        ("train mcdi", "runs/zoo/corpus holds no manifest.json"),
        ("train igpg/digits corpus=nowhere", "nowhere holds no manifest.json"),
        ("evaluate corpus=nowhere", "nowhere holds no manifest.json"),
        ("generate generator=nowhere", "nowhere holds no trained generator"),
        ("corpus info nowhere", "nowhere holds no manifest.json"),
        ("retrieve nowhere", "nowhere holds no manifest.json"),
        ("adapt nowhere --support x.npz", "nowhere holds no trained generator"),
        ("job status x --address http://127.0.0.1:1", "no Ray cluster answers"),
    ],
)
def test_torch_is_not_imported(command: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", _CODE, *command.split()], capture_output=True, text=True, timeout=180)
    assert said in " ".join((done.stdout + done.stderr).split())
    assert done.stdout.splitlines()[-1].split() == ["imported:"]


def test_a_worker_imports_no_more_than_it_needs_to_train() -> None:
    code = (
        "import sys, raywgen.training.workers; print(*{'sklearn', 'scipy', 'deepspeed', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    assert done.stdout.split() == []
