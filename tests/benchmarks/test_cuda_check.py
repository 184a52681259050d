from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raywgen.benchmarks.cuda_check import CudaCheckConfig
from raywgen.config import ConfigError, load_config

_ROOT = Path(__file__).parents[2]
_WITHOUT_RAY = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "deepspeed"):
            raise ModuleNotFoundError(f"No module named '{name}'")

sys.meta_path.insert(0, Refuse())
from raywgen.benchmarks.run import main
"""
_A_CPU_FOR_A_GPU = """
import torch
import raywgen.benchmarks.cuda_check as check
check.resolved_device = lambda name: torch.device("cpu")
"""


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{_WITHOUT_RAY}{before}main()", "cuda-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, check=False)


def test_figures_are_printed_where_neither_ray_nor_deepspeed_is_installed() -> None:
    done = run("cases=[direct-heads,hypernetwork]", "num_steps=1", before=_A_CPU_FOR_A_GPU)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "cuda-check"
    names = ("", "_direct", "_hypernetwork")
    assert result["figures"] == {f"{figure}{name}": 0.0 for name in names for figure in ("loss_diff", "value_diff")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_one_line() -> None:
    done = run()
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "device=cuda" in line
    assert "{" not in done.stdout


def test_unknown_cases_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cases=\['igpq'\]: give some of igpg"):
        load_config(CudaCheckConfig, None, ["cases=[igpq]"])
