from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.generators.bundle import save_bundle
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.mcdi import McDi, McDiConfig
from tests.builders import DATA, SMALL, network, normalizers


def test_a_task_is_adapted_to_and_milliseconds_are_printed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = McDiConfig(network=NetworkConfig(width=32, num_heads=2, num_layers=1))
    save_bundle(McDi(config, normalizers(SMALL), DATA).eval(), tmp_path / "generator", {})
    np.savez(tmp_path / "s.npz", x=np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32), y=np.arange(8) % 2)
    out = tmp_path / "adapted.safetensors"
    arguments = ["adapt", str(tmp_path), "--support", str(tmp_path / "s.npz"), f"out={out}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "38 values for 2 classes from 8 examples" in result.output.replace("\n", " ")
    assert "ms to generate" in result.output
    network().load_state_dict(load_file(out), strict=True)


def test_help_lists_the_settings_of_adapt() -> None:
    result = CliRunner().invoke(app, ["adapt", "--help"])
    assert result.exit_code == 0
    assert "--support" in result.output
    assert "temperature" in result.output
