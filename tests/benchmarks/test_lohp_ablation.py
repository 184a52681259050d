from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.benchmarks.lohp_ablation import LoHpAblationConfig, draw_heat_maps


def test_the_heat_maps_tell_every_value(tmp_path: Path) -> None:
    values = {
        (length, rho, mix): 90 + length + 10 * rho + mix
        for length in (2, 4)
        for rho in (0.0, 0.1)
        for mix in (0.0, 0.5)
    }
    draw_heat_maps(values, tmp_path / "new" / "maps.svg")
    text = (tmp_path / "new" / "maps.svg").read_text()
    for value in values.values():
        assert f"<!-- {value:.1f} -->" in text
    for label in ("SAM radius 0.1", "share of stored paths", "sub-trajectory length"):
        assert label in text


def test_lengths_must_divide_the_path() -> None:
    with pytest.raises(ValueError, match="length=5: must divide num_steps=12"):
        LoHpAblationConfig(data="digits", lengths=[5])
