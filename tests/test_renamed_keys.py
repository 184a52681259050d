"""Every renamed key: its row in the changelog, and the error that names the new key."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from raywgen.benchmarks.demo import DemoConfig
from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.run import BENCHMARKS
from raywgen.cli.settings import SCHEMAS
from raywgen.config import ConfigError, load_config
from raywgen.generators import METHODS
from raywgen.renamed_keys import RENAMED
from raywgen.stored_config import stored_config
from raywgen.training import TrainConfig
from raywgen.tuning import TuneConfig
from raywgen.tuning.pipeline import Pipeline

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
ROWS = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)


def schemas() -> Iterator[tuple[type[Any], list[str]]]:
    """Yields the configs of all commands and benchmarks, that of a training run once for each method."""
    yield from ((TrainConfig, [f"method={name}"]) for name in METHODS)
    for where in SCHEMAS.values():
        module, _, name = where.partition(":")
        yield getattr(importlib.import_module(module), name), []
    for where in BENCHMARKS.values():
        yield get_type_hints(importlib.import_module(where).measure)["config"], []


def message(schema: type[Any], overrides: list[str]) -> str:
    try:
        load_config(schema, None, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def test_the_changelog_lists_all_renamed_keys() -> None:
    assert dict(ROWS) == RENAMED
    assert len(ROWS) == len(RENAMED)


@pytest.mark.parametrize(("old", "new"), ROWS)
def test_an_old_key_names_the_new_one(old: str, new: str) -> None:
    said = f"unknown key '{old}' in the command line; it is called '{new}' now"
    group = new.partition(".")[0]
    possible = [(schema, rest) for schema, rest in schemas() if group in {field.name for field in fields(schema)}]
    using = [(schema, rest) for schema, rest in possible if message(schema, [*rest, f"{old}=1"]) == said]
    assert using
    for schema, rest in using:
        assert "unknown key" not in message(schema, [*rest, f"{new}=1"])


def test_old_keys_of_a_method_are_known_wherever_its_settings_stand() -> None:
    said = message(DemoConfig, ["igpg.functional.num_steps=1"])
    assert said == "unknown key 'igpg.functional' in the command line; it is called 'igpg.task_loss' now"
    said = message(FewShotConfig, ["functional.num_steps=1"])
    assert said == "unknown key 'functional' in the command line; it is called 'task_loss' now"
    with pytest.raises(ConfigError, match=r"unknown key 'functional' in run: generator; it is called 'task_loss' now"):
        stored_config(TrainConfig, {"generator": {"functional": {"num_steps": 1}}}, "run")


def test_old_keys_in_a_search_space_name_the_new_one() -> None:
    config = TuneConfig(
        train="igpg", corpus="corpus", space={"train.generator.functional.num_steps": {"choice": [1, 2]}}
    )
    with pytest.raises(ConfigError, match=r"it is called 'train\.generator\.task_loss' now"):
        Pipeline(config).check()
