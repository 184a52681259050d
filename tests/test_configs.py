from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.config import load_config
from raywgen.tasks.encoder_training import EncoderConfig
from raywgen.training import TrainConfig
from raywgen.tuning import TuneConfig
from raywgen.zoo import ZooConfig

ROOT = Path(__file__).parents[1] / "configs"
SCHEMAS = {"zoo": ZooConfig, "encoder": EncoderConfig, "tune": TuneConfig} | dict.fromkeys(
    ("igpg", "mcdi", "lohp", "units", "hypernetwork"), TrainConfig
)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_config(SCHEMAS[path.parent.name], path)
    if isinstance(config, TrainConfig):
        assert config.method == path.parent.name


def test_the_shipped_digits_configs_are_the_measured_defaults() -> None:
    assert load_config(TrainConfig, ROOT / "igpg" / "digits.yaml").generator == TrainConfig().generator
    assert load_config(ZooConfig, ROOT / "zoo" / "digits.yaml") == ZooConfig()
