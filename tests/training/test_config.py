from __future__ import annotations

import json
from pathlib import Path

import pytest

from raywgen.config import ConfigError, load_config, save_config
from raywgen.corpus import Corpus
from raywgen.generators.bundle import SCHEMA_VERSION, BundleFormatError
from raywgen.generators.igpg import IGPGConfig
from raywgen.training import TrainConfig, launch
from raywgen.training.config import read_train_config


def test_keys_of_the_method_are_checked_against_its_own_schema() -> None:
    config = load_config(TrainConfig, None, ["generator.prior.num_layers=2"])
    assert isinstance(config.generator, IGPGConfig)
    assert config.generator.prior.num_layers == 2
    with pytest.raises(ConfigError, match=r"did you mean 'generator\.prior'"):
        load_config(TrainConfig, None, ["generator.priour.num_layers=2"])
    with pytest.raises(ConfigError, match="did you mean 'igpg'"):
        load_config(TrainConfig, None, ["method=igp"])


@pytest.mark.parametrize(
    "override",
    ["zero_stage=4", "num_workers=-1", "log_every=0", "num_query_samples=0", "worker_timeout=0", "augment=turn"],
)
def test_impossible_values_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_config(TrainConfig, None, [override])


def test_workers_are_a_number_or_a_range(tmp_path: Path) -> None:
    one, some = (load_config(TrainConfig, None, [f"num_workers={given}"]) for given in ("3", "[2,8]"))
    assert (one.min_workers, one.max_workers, one.is_elastic) == (3, 3, False)
    assert (some.min_workers, some.max_workers, some.is_elastic) == (2, 8, True)
    save_config(some, tmp_path / "config.yaml")
    for read in (load_config(TrainConfig, tmp_path / "config.yaml"), read_train_config(tmp_path / "config.yaml")):
        assert read == some


@pytest.mark.parametrize("given", ["[2]", "[0,2]", "[3,2]", "[1,2,3]", "[]"])
def test_what_is_no_range_of_workers_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="give a number, or the fewest and the most"):
        load_config(TrainConfig, None, [f"num_workers={given}"])


@pytest.mark.parametrize("given", ["[1,x]", "two", "[1.5,2]"])
def test_workers_that_are_no_numbers_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"num_workers: .*incompatible with type hint"):
        load_config(TrainConfig, None, [f"num_workers={given}"])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["offload=optimizer", "zero_stage=0"], "offload=optimizer: needs zero_stage=1 at least, not 0"),
        (["offload=parameters", "zero_stage=2"], "offload=parameters: needs zero_stage=3 at least, not 2"),
        (["offload=optimizer", "num_workers=0"], "num_workers=0 trains without it"),
        (["compile=true", "zero_stage=3"], "compile=true: under zero_stage=3"),
        (["accumulate=0"], "accumulate=0: must be at least 1"),
    ],
)
def test_strategies_that_do_not_exist_are_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(TrainConfig, None, overrides)


@pytest.mark.parametrize("key", ["activation_checkpointing", "compile"])
def test_inner_steps_are_neither_recomputed_nor_compiled(key: str, zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = load_config(
        TrainConfig,
        None,
        ["method=mcdi", f"corpus={zoo_corpus.location}", f"out={tmp_path / 'run'}", "num_workers=0", f"{key}=true"],
    )
    with pytest.raises(ConfigError, match=f"{key}=true: stage 'denoiser' of mcdi takes inner steps"):
        launch([config])
    assert not (tmp_path / "run").exists()


def test_a_saved_config_loads_unchanged(tmp_path: Path) -> None:
    config = load_config(TrainConfig, None, ["generator.task_loss.num_steps=0", "seed=4"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config


def test_more_workers_than_networks_in_a_batch_are_refused(zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = TrainConfig(corpus=zoo_corpus.location, out=str(tmp_path / "run"), num_workers=33)
    with pytest.raises(ConfigError, match=r"num_workers=33 is more than .* generator\.prior\.batch_size=32;"):
        launch([config])
    assert not (tmp_path / "run").exists()


def test_another_config_in_the_same_folder_is_refused_but_other_workers_are_not(
    zoo_corpus: Corpus, tmp_path: Path
) -> None:
    kept = TrainConfig(corpus=zoo_corpus.location, out=str(tmp_path), num_workers=2)
    save_config(kept, tmp_path / "config.yaml")
    (tmp_path / "generator").mkdir()
    bundle = tmp_path / "generator" / "generator.json"
    bundle.write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
    launch([TrainConfig(corpus=zoo_corpus.location, out=str(tmp_path), num_workers=1, zero_stage=2)])
    with pytest.raises(ConfigError, match="another config"):
        launch([TrainConfig(corpus=zoo_corpus.location, out=str(tmp_path), num_workers=2, seed=1)])
    newer = json.dumps({"schema_version": SCHEMA_VERSION + 1})
    bundle.write_text(newer)
    with pytest.raises(BundleFormatError, match="later versions read later formats"):
        launch([kept])
    assert bundle.read_text() == newer
