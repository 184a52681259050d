from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from raywgen.benchmarks.demo_figures import FIGURES
from raywgen.benchmarks.run import UnknownBenchmarkError, run
from raywgen.config import ConfigError
from raywgen.tasks import build_network

ROOT = Path(__file__).parents[2]
SMALL = [
    "demo.num_workers=0",
    "demo.best_of=2",
    "demo.zoo.num_seen_tasks=8",
    "demo.zoo.num_validation_tasks=2",
    "demo.zoo.num_unseen_tasks=2",
    "demo.zoo.num_steps=60",
    "demo.zoo.checkpoint_steps=[50,60]",
    "demo.igpg.tokenizer.num_steps=3",
    "demo.igpg.tokenizer.quantiser.num_codes=16",
    "demo.igpg.prior.num_steps=2",
    "demo.igpg.task_loss.num_steps=2",
    "demo.hypernetwork.task_loss.num_steps=3",
]


def test_unknown_names_are_met_with_the_nearest() -> None:
    with pytest.raises(UnknownBenchmarkError, match="did you mean 'demo'"):
        run(["demmo"])
    with pytest.raises(ConfigError, match="did you mean 'seeds'"):
        run(["demo", "seedz=2"])


@pytest.mark.slow
def test_demo_from_nothing_twice_gives_the_same_figures(tmp_path: Path) -> None:
    results = []
    for attempt in ("first", "second"):
        out = tmp_path / attempt
        command = [sys.executable, str(ROOT / "jobs" / "benchmark.py"), "demo", *SMALL, f"out={out}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = results
    assert first["benchmark"] == "demo"
    assert set(first["figures"]) == set(FIGURES)
    for name in set(FIGURES) - {"minutes"}:
        assert first["figures"][name] == second["figures"][name], name
    folder = tmp_path / "first" / "seed0"
    for name in ("config.yaml", "run.json", "report.html", "corpus/manifest.json", "igpg/generator/README.md"):
        assert (folder / name).is_file(), name
    assert list((folder / "igpg" / "tensorboard").glob("events*"))
    rows = json.loads((folder / "networks" / "networks.json").read_text())
    assert len(rows) == 4
    for row in rows:
        widths = [int(width) for width in row["network"].split("-")[1:]]
        module = build_network({"name": "mlp", "widths": widths})
        module.load_state_dict(load_file(row["path"]), strict=True)
