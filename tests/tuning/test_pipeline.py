from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raywgen.config import ConfigError, load_config, merge_config, save_config
from raywgen.generators.lohp import LoHpConfig
from raywgen.training import TrainConfig
from raywgen.tuning import TuneConfig
from raywgen.tuning.pipeline import Pipeline
from tests.builders import settings_of

SEED = {"train.seed": {"int": [0, 3]}}
ROOT = Path(__file__).parents[2] / "configs" / "tune"


def config(**changes: Any) -> TuneConfig:
    return TuneConfig(**({"zoo": "digits", "train": "lohp", "space": SEED} | changes))


def test_knobs_and_fixed_values_reach_the_configs() -> None:
    fixed = {
        "zoo.optimizers": [{"optimizer": "sgd"}, {"optimizer": "adam"}],
        "train": {"generator": {"network": {"width": 32}}},
    }
    space = {"zoo.optimizers.1.sam.rho": {"choice": [0.0, 0.1]}, "train.generator.policy.mix": {"uniform": [0, 1]}}
    pipeline = Pipeline(config(fixed=fixed, space=space))
    configs = pipeline.configs({"zoo.optimizers.1.sam.rho": 0.1, "train.generator.policy.mix": 0.25})
    assert configs.zoo is not None
    assert [one.sam.rho for one in configs.zoo.optimizers] == [0.0, 0.1]
    settings = settings_of(configs.train, LoHpConfig)
    assert (settings.policy.mix, settings.network.width) == (0.25, 32)
    assert settings_of(pipeline.base.train, LoHpConfig).policy.mix == 0.5
    assert pipeline.turns_zoo


def test_a_trial_takes_nothing_over_from_the_one_before() -> None:
    """A knob that does not exist beside the values of a trial keeps the base's value."""
    mix, width = "train.generator.policy.mix", "train.generator.network.width"
    pipeline = Pipeline(config(space={mix: {"uniform": [0, 1]}, width: {"choice": [16, 32]}}))
    base = settings_of(pipeline.base.train, LoHpConfig).policy.mix
    assert settings_of(pipeline.configs({mix: 0.25, width: 16}).train, LoHpConfig).policy.mix == 0.25 != base
    assert settings_of(pipeline.configs({width: 32}).train, LoHpConfig).policy.mix == base


def test_one_recipe_has_one_corpus() -> None:
    pipeline = Pipeline(config(space={"zoo.learning_rate": {"choice": [1e-3, 2e-3]}} | SEED))
    all_configs = [
        pipeline.configs({"zoo.learning_rate": rate, "train.seed": seed}) for rate in (1e-3, 2e-3) for seed in (0, 1)
    ]
    names = [configs.corpus_name for configs in all_configs]
    assert names[0] == names[1] != names[2] == names[3]


def test_a_training_config_may_be_a_file(tmp_path: Path) -> None:
    save_config(TrainConfig(method="mcdi", shot=3), tmp_path / "mine.yaml")
    configs = Pipeline(config(train=str(tmp_path / "mine.yaml"))).configs({"train.seed": 2})
    assert (configs.train.method, configs.train.shot, configs.train.seed) == ("mcdi", 3, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"zoo": ""}, "give either zoo"),
        ({"corpus": "runs/corpus"}, "give either zoo"),
        ({"train": "nothing.yaml"}, "nothing.yaml does not exist"),
        ({"space": {"trian.seed": {"int": [0, 1]}}}, "keys begin with zoo. or train., did you mean 'train.'?"),
        ({"space": {"train.sed": {"int": [0, 1]}}}, "unknown key 'train.sed' in space; did you mean 'train.seed'?"),
        (
            {"space": {"train.generator.policy.lamb": {"uniform": [0.5, 1]}}},
            "did you mean 'train.generator.policy.lam'?",
        ),
        ({"space": {"zoo.optimizers.0.sam.rho": {"uniform": [0, 1]}}}, "unknown key 'zoo.optimizers.0.sam.rho'"),
        ({"space": {"train.seed.more": {"int": [0, 1]}}}, "train.seed is a value"),
        ({"fixed": {"zoo.num_seen": 3}}, "unknown key 'zoo.num_seen' in fixed; did you mean 'zoo.num_s"),
        ({"fixed": {"train.out": "here"}}, "train.out is chosen by the search"),
        ({"fixed": {"train.method": "mcdi"}}, "train.method is chosen by the search; give the method or its config as"),
        ({"fixed": {"train": {"method": "mcdi"}}}, "such as train=mcdi"),
        ({"space": {"train.method": {"choice": ["mcdi", "lohp"]}}}, "train.method is no knob; give the method"),
        ({"zoo": "", "corpus": "c", "space": {"zoo.seed": {"int": [0, 1]}}}, "zoo.seed is a key of a recipe"),
        ({"space": {"train.num_workers": {"int": [0, 4]}}}, "train.num_workers is no knob"),
        (
            {"space": {"train.generator.path.length": {"choice": [4, 5]}}},
            "the space allows train.generator.path.length=5, which cannot be: ",
        ),
        ({"space": {"train.generator.policy.optimizer.learning_rate": {"uniform": [-1, 1]}}}, "must be above 0"),
        ({"space": {"train.generator.network.width": {"choice": [32, "wide"]}}}, "width=wide, which cannot be"),
        # Each of both is right by itself.
        (
            {
                "fixed": {"train.generator.sampling.num_steps": 12},
                "space": {
                    "train.generator.path.num_steps": {"choice": [12, 16]},
                    "train.generator.path.length": {"choice": [4, 12]},
                },
            },
            "length=12, which cannot be: ",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_begins(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline(config(**changes)).check()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["igpg", "mcdi", "lohp"])
def test_shipped_searches_allow_nothing_that_cannot_be(method: str) -> None:
    shipped = load_config(TuneConfig, ROOT / f"{method}.yaml")
    pipeline = Pipeline(shipped)
    pipeline.check()
    assert pipeline.base.train.method == method
    assert shipped.zoo == "digits"


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("lohp", {"path.length", "policy.lam", "policy.mix", "sam.rho"}),
        (
            "mcdi",
            {"diffusion.num_targets", "diffusion.num_steps", "denoiser.inner_rate", "denoiser.optimizer.learning_rate"},
        ),
        ("mcdi", {"sam.rho"}),
        ("igpg", {"chunk_length", "num_codes", "num_levels", "tokenizer.width", "tokenizer.optimizer.learning_rate"}),
        ("igpg", {"prior.width", "prior.optimizer.learning_rate"}),
    ],
)
def test_shipped_searches_turn_the_knobs_of_their_method(method: str, wanted: set[str]) -> None:
    keys = [knob.key for knob in Pipeline(load_config(TuneConfig, ROOT / f"{method}.yaml")).knobs]
    assert all(any(key.endswith(name) for key in keys) for name in wanted)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"search": "grid"}, "search=grid: give one of optuna, random"),
        ({"scheduler": "hyperband"}, "scheduler=hyperband: give one of asha, pbt, none"),
        ({"num_trials": 0}, "num_trials must be at least 1"),
        ({"rungs": [0.5]}, "the last one 1"),
        ({"rungs": [0.5, 0.25, 1.0]}, "ascending"),
        ({"reduction": 1.0}, "reduction=1.0"),
        ({"scheduler": "pbt", "num_trials": 2}, "a population of at least 4"),
        ({"scheduler": "pbt", "num_trials": 4, "max_concurrent": 2}, "as many of them at once as fit"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected.replace("(", r"\(")):
        merge_config(TuneConfig, [("search.yaml", changes)])
