"""Configs: defaults, file and overrides in this order; messages that name the key; a complete round trip."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.benchmarks.demo import DemoConfig
from raywgen.config import SHIPPED, ConfigError, config_file, load_config, save_config, shipped_config, to_yaml
from raywgen.config_help import describe
from raywgen.generators import OptimizerConfig
from raywgen.generators.igpg import IGPGConfig
from raywgen.stored_config import stored_config
from raywgen.training import load_train_config

Schedule = Literal["cosine", "linear", "constant"]


@dataclass
class Optimiser:
    learning_rate: float = 1e-3
    num_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    name: str = "adam"
    schedule: Schedule = "cosine"
    zero_stage: Literal[0, 1, 2] = 1
    metrics: list[Literal["loss", "accuracy"]] = field(default_factory=list)
    fallback: Schedule | None = None


@dataclass
class Run:
    seed: int = 0
    optimiser: Optimiser = field(default_factory=Optimiser)
    networks: list[list[int]] = field(default_factory=lambda: [[64, 14, 2]])
    recipe: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")


@dataclass
class Stage:
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(learning_rate=0.5, num_steps=7))
    spare: Optimiser | None = None


@dataclass
class Method:
    stage: Stage = field(default_factory=Stage)


@dataclass
class OpenRun:
    stage: Stage = field(default_factory=lambda: Stage(optimiser=Optimiser(num_steps=3)))
    method: Any = field(default=None, metadata={"group": lambda values: Method})


@dataclass
class NeedsPath:
    path: str


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\noptimiser:\n  num_steps: 7\n  learning_rate: 2e-4\n")
    config = load_config(Run, path, ["optimiser.num_steps=9"])
    assert config == Run(seed=3, optimiser=Optimiser(num_steps=9, learning_rate=2e-4))
    assert load_config(Run) == Run()
    assert load_config(Run, write(tmp_path, "")) == Run()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", Run(seed=7)),
        ("optimiser.learning_rate=1e-2", Run(optimiser=Optimiser(learning_rate=0.01))),
        ("optimiser.betas=[0.5,0.9]", Run(optimiser=Optimiser(betas=(0.5, 0.9)))),
        ("networks=[[8,4],[8,2]]", Run(networks=[[8, 4], [8, 2]])),
        ("recipe.name=digits", Run(recipe={"name": "digits"})),
        ("note=a=b", Run(note="a=b")),
        ("note=null", Run()),
        ("note=", Run(note="")),
        ("optimiser.name=", Run(optimiser=Optimiser(name=""))),
        ("resume=true", Run(resume=True)),
        ("optimiser.schedule=linear", Run(optimiser=Optimiser(schedule="linear"))),
        ("optimiser.zero_stage=2", Run(optimiser=Optimiser(zero_stage=2))),
        ("optimiser.metrics=[accuracy,loss]", Run(optimiser=Optimiser(metrics=["accuracy", "loss"]))),
        ("optimiser.fallback=linear", Run(optimiser=Optimiser(fallback="linear"))),
        ("optimiser.fallback=null", Run(optimiser=Optimiser(fallback=None))),
    ],
)
def test_override_syntax(override: str, expected: Run) -> None:
    assert load_config(Run, None, [override]) == expected


def test_numbers_read_alike_from_file_and_command_line(tmp_path: Path) -> None:
    from_file = load_config(Run, write(tmp_path, "recipe:\n  rate: 1e-3\n"))
    assert from_file.recipe == {"rate": 0.001}
    assert load_config(Run, None, ["recipe.rate=1e-3"]) == from_file


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sede=1", r"unknown key 'sede' in the command line; did you mean 'seed'\?"),
        ("optimiser.num_step=1", r"unknown key 'optimiser\.num_step' .* did you mean 'optimiser\.num_steps'\?"),
        ("seed=many", r"the command line: seed: Value 'many' .* Integer"),
        ("seed=", r"seed: Value '' .* Integer"),
        ("seed=1.5", r"seed: Value '1\.5' .* Integer"),
        ("seed=null", r"seed: .*'None'"),
        ("optimiser.betas=[a,b]", r"the command line: optimiser: Value could not be converted to Float"),
        ("networks=3", r"networks: "),
        ("optimiser=3", r"'optimiser' in the command line holds a group of keys, not 3"),
        ("seed", r"'seed' is not an override; write it as key=value"),
        ("=3", r"'=3' is not an override"),
        ("note=[a", r"cannot read the overrides \['note=\[a'\]"),
        ("note=${nowhere}", r"note: Interpolation key 'nowhere' not found"),
        (
            "optimiser.schedule=linar",
            r"^the command line: optimiser\.schedule=linar: give one of cosine, linear, constant; "
            r"did you mean 'linear'\?$",
        ),
        ("optimiser.schedule=", r"optimiser\.schedule=: give one of cosine, linear, constant; did you mean"),
        ("optimiser.schedule=null", r"optimiser\.schedule: .*'None'"),
        ("optimiser.schedule=[linear]", r"optimiser\.schedule=\['linear'\]: give one of cosine, linear, constant"),
        ("optimiser.zero_stage=3", r"optimiser\.zero_stage=3: give one of 0, 1, 2; did you mean"),
        ("optimiser.zero_stage=true", r"optimiser\.zero_stage=True: give one of 0, 1, 2"),
        ("optimiser.metrics=[los]", r"optimiser\.metrics\[0\]=los: give one of loss, accuracy; did you mean 'loss'\?"),
        ("optimiser.fallback=x", r"optimiser\.fallback=x: give one of cosine, linear, constant"),
        ("seed=-1", r"seed must be at least 0, not -1"),
    ],
)
def test_bad_overrides_are_named(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(Run, None, [override])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sede: 1", r"unknown key 'sede' in .*run\.yaml; did you mean 'seed'\?"),
        ("optimiser:\n  beta: 1", r"unknown key 'optimiser\.beta' in .*run\.yaml; did you mean 'optimiser\.betas'\?"),
        ("3: 4", r"unknown key '3' in .*run\.yaml"),
        ("seed: [1, 2]", r"run\.yaml: seed: .* Integer"),
        ("optimiser: fast", r"'optimiser' in .*run\.yaml holds a group of keys, not 'fast'"),
        ("- a\n- b", r"run\.yaml must hold `key: value` lines, not a list"),
        ("3", r"run\.yaml .* must hold `key: value` lines"),
        ("seed: 1\n\tx: 2", r"run\.yaml is not valid YAML"),
        ("seed: 1\nseed: 2", r"run\.yaml is not valid YAML"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(Run, write(tmp_path, text))


def test_unreadable_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run\.yaml does not exist"):
        load_config(Run, path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.yaml is not valid YAML"):
        load_config(Run, path)


@pytest.mark.parametrize("value", ["linar", None, 1, ["linear"], {"a": 1}])
def test_a_stored_choice_is_one_of_the_known(value: object) -> None:
    assert stored_config(Run, {"optimiser": {"schedule": "linear"}}, "run") == Run(
        optimiser=Optimiser(schedule="linear")
    )
    with pytest.raises(ConfigError, match=r"^run: optimiser: schedule=.*: give one of cosine, linear, constant; did"):
        stored_config(Run, {"optimiser": {"schedule": value}}, "run")


STORED = {"stage": {"optimiser": {"name": "sgd"}}, "method": {"stage": {"optimiser": {"name": "sgd"}}}}


def test_keys_that_a_group_leaves_out_take_the_values_of_the_field_that_holds_it(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(STORED))
    for read in (stored_config(OpenRun, STORED, "run"), load_config(OpenRun, path)):
        assert read.stage.optimiser == Optimiser(name="sgd", num_steps=3)
        assert read.method.stage.optimiser == Optimiser(name="sgd", learning_rate=0.5, num_steps=7)
    assert stored_config(Stage, {"spare": {"name": "sgd"}}, "run").spare == Optimiser(name="sgd")


def test_a_value_without_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match="path"):
        load_config(NeedsPath)
    assert load_config(NeedsPath, None, ["path=runs/a"]) == NeedsPath("runs/a")


# "${" and "???" mean something to OmegaConf; surrogates and control characters are no text that YAML holds.
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20).filter(
    lambda text: "${" not in text and text != "???"
)
scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | texts
configs = st.builds(
    Run,
    seed=st.integers(0, 2**60),
    optimiser=st.builds(
        Optimiser,
        learning_rate=st.floats(allow_nan=False),
        num_steps=st.integers(-(2**40), 2**40),
        betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        name=texts,
        schedule=st.sampled_from(get_args(Schedule)),
        zero_stage=st.sampled_from((0, 1, 2)),
        metrics=st.lists(st.sampled_from(("loss", "accuracy")), max_size=3),
        fallback=st.none() | st.sampled_from(get_args(Schedule)),
    ),
    networks=st.lists(st.lists(st.integers(1, 999), max_size=4), max_size=3),
    recipe=st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True), scalars | st.lists(scalars, max_size=3), max_size=4
    ),
    note=st.none() | texts,
    resume=st.booleans(),
)


@given(config=configs)
@settings(max_examples=120)
def test_a_saved_config_comes_back_unchanged(tmp_path_factory: pytest.TempPathFactory, config: Run) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    save_config(config, path)
    assert path.read_text(encoding="utf-8") == to_yaml(config)
    assert load_config(Run, path) == config


def test_describe_lists_nested_keys_with_defaults_and_help() -> None:
    settings = {setting.key: setting for setting in describe(DemoConfig)}
    assert settings["best_of"].default == "8"
    assert settings["igpg.task_loss.num_steps"].help.startswith("Optimiser steps; 0 switches the stage off")
    assert settings["igpg.tokenizer.chunk_length"].help == "K, values of a chunk, one position of the prior."
    assert all(setting.help for setting in settings.values())


def test_describe_gives_the_defaults_of_a_group_where_it_stands() -> None:
    found = {setting.key: setting.default for setting in describe(IGPGConfig)}
    default = IGPGConfig()
    rates = {stage: getattr(default, stage).optimizer.learning_rate for stage in ("tokenizer", "prior", "task_loss")}
    # Neither those of the optimiser's own class nor one stage's for all.
    assert OptimizerConfig().learning_rate not in rates.values()
    assert len(set(rates.values())) > 1
    assert {stage: float(found[f"{stage}.optimizer.learning_rate"]) for stage in rates} == rates


def test_a_name_is_that_of_a_file_here_or_of_a_shipped_config_past_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    digits = SHIPPED / "zoo/digits.yaml"
    Path("digits").mkdir()
    Path("igpg/digits").mkdir(parents=True)
    assert config_file("digits", "zoo") == digits
    assert shipped_config("zoo", "digits") == str(digits)
    assert config_file("zoo/digits") == digits
    assert load_train_config("igpg/digits").method == "igpg"
    with pytest.raises(ConfigError, match=r"'digit' is no file and none of .*did you mean 'digits'"):
        shipped_config("zoo", "digit")
    Path("digits").rmdir()
    Path("digits").touch()
    assert config_file("digits", "zoo") == Path("digits")
    assert config_file("digits", "zoo", Path("igpg")) == digits
    assert config_file("nothing") is None
