"""Methods have names in one place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raywgen
from raywgen.config import ConfigError, load_config
from raywgen.generators import METHODS, Generator, OptimizerConfig, StageConfig, UnknownMethodError, method
from raywgen.generators.bundle import build_generator, load_bundle, save_bundle
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg.config import PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.sealed import sealed_json, unseal
from raywgen.training import TrainConfig, launch, load_train_config
from raywgen.training.config import read_train_config
from raywgen.training.status import run_status
from raywgen.trust import UntrustedError
from tests.builders import DATA, igpg, normalizers
from tests.generators.own import Own, OwnConfig

OWN = "tests.generators.own:Own"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_builds_a_generator_of_its_name_from_defaults(name: str) -> None:
    built = method(name)(method(name).Config(), normalizers(), DATA)
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests.generators.own:Absent", "did you mean 'tests.generators.own:Own'?"),
        ("tests.generators.own:OwnConfig", "no subclass of raywgen.generators.interface.Generator"),
        ("tests.generators.own:Unfinished", "does not define all_stages"),
        ("tests.generators.own:WithoutConfig", "no usable `Config`"),
        ("tests.generators.own:WithForeignConfig", "that inherits raywgen.generators.GeneratorConfig"),
        ("tests.generators.own:WithUndecoratedConfig", "give it a dataclass of its settings"),
        ("tests.generators.absent:Own", "give the command in the folder that the package lies in"),
        ("tests.generators:Own", "tests.generators holds no subclass of raywgen.generators.Generator"),
        ("my-package.own:Own", "write it as package.module:Class"),
        ("tests.generators.own.Own", "one of your own is package.module:Class"),
    ],
)
def test_a_class_that_is_no_generator_is_refused_with_the_remedy(name: str, said: str) -> None:
    with pytest.raises(UnknownMethodError, match=re.escape(said)) as caught:
        method(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(TrainConfig, None, [f"method={name}"])


def test_a_generator_of_a_users_own_has_its_name_and_config() -> None:
    config = load_config(TrainConfig, None, [f"method={OWN}", "generator.only.num_steps=7"])
    assert config.generator == OwnConfig(only=StageConfig(num_steps=7))
    assert method(OWN) is Own
    assert build_generator(OWN, config.generator, normalizers(), DATA, seed=0).method == OWN
    with pytest.raises(ConfigError, match=r"unknown key 'generator\.on.*did you mean 'generator\.only'"):
        load_config(TrainConfig, None, [f"method={OWN}", "generator.on=1"])


FOREIGN = "raywgen_foreign.module:Class"


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that the user did not name, and that would leave a file if it were imported."""
    folder = tmp_path / "raywgen_foreign"
    folder.mkdir()
    (folder / "module.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "imported"


def test_data_never_imports_a_method(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"method: {FOREIGN}\n")
    save_bundle(igpg(), tmp_path, {})
    content = unseal((tmp_path / "generator.json").read_bytes())
    (tmp_path / "generator.json").write_text(sealed_json(content | {"method": FOREIGN}))
    launched = TrainConfig(out=str(tmp_path), corpus=str(tmp_path), num_workers=0)
    reads: list[Callable[[], Any]] = [
        lambda: read_train_config(tmp_path / "config.yaml"),
        lambda: load_bundle(tmp_path),
        lambda: raywgen.load(tmp_path, trust=("raywgen_foreig",)),
    ]
    for read in reads:
        with pytest.raises(UntrustedError, match=r"method 'raywgen_foreign.*--trust raywgen_foreign"):
            read()
    with pytest.raises(ConfigError, match=rf"method is {FOREIGN} there and igpg here"):
        launch([launched])
    assert run_status(tmp_path).method == FOREIGN
    assert not foreign.exists()


def test_a_users_word_imports_a_method(foreign: Path) -> None:
    with pytest.raises(ConfigError, match=r"module 'raywgen_foreign\.module' has no attribute 'Class'"):
        load_train_config(FOREIGN)
    assert foreign.exists()
