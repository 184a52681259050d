"""Methods have names in one place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from raywgen.config import ConfigError, load_config
from raywgen.generators import METHODS, Generator, OptimizerConfig, StageConfig, UnknownMethodError, method
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg.config import PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from tests.builders import DATA, normalizers


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_builds_a_generator_of_its_name_from_defaults(name: str) -> None:
    built = method(name).build(method(name).config(), normalizers(), DATA)
    assert isinstance(built, Generator)
    assert built.method == name
    assert dataclasses.is_dataclass(built.config)
    assert all(stage.config.num_steps > 0 for stage in built.stages())


@pytest.mark.parametrize(("wrong", "near"), [("igpq", "igpg"), ("hypernet", "hypernetwork"), ("IGPG2", "igpg")])
def test_an_unknown_method_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UnknownMethodError, match="did you mean") as caught:
        method(wrong)
    assert f"unknown method '{wrong}'" in str(caught.value)
    if wrong != "IGPG2":
        assert f"did you mean '{near}'" in str(caught.value)
    assert f"known: {', '.join(METHODS)}" in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "setting", "message"),
    [
        (StageConfig, {"num_steps": -1}, "num_steps=-1"),
        (StageConfig, {"batch_size": 0}, "batch_size=0"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate=0.0"),
        (OptimizerConfig, {"grad_clip": 0.0}, "grad_clip=0.0"),
        (QuantiserConfig, {"num_codes": 1}, "num_codes"),
        (TokenizerConfig, {"num_steps": -1}, "num_steps=-1"),
        (PriorConfig, {"width": 12}, "width=12"),
    ],
)
def test_configs_refuse_what_cannot_train(schema: type, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schema(**setting)


def test_an_unknown_optimiser_is_refused_where_a_config_is_read() -> None:
    with pytest.raises(ConfigError, match="adamw, sgd"):
        load_config(OptimizerConfig, None, ["kind=lion"])
