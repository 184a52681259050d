"""One clear line each, through the command itself, before any trial begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from raywgen import cli
from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.locks import InUseError, only_one
from raywgen.tuning import tune
from raywgen.tuning.objective import check_corpus
from raywgen.tuning.pipeline import Pipeline
from raywgen.tuning.population import check_knobs, check_stage
from tests.tuning.builders import WIDTH, tune_config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lohp", "num_trial=3"], "unknown key 'num_trial' in the command line; did you mean 'num_trials'?"),
        (["lohp", "space.train.generator.policy.mx={uniform: [0, 1]}"], "did you mean 'train.generator.policy.mix'?"),
        (["lohp", "space.train.generator.policy.mix={uniform: [0, 2]}"], "mix lies between 0 and 1"),
        (["nothing.yaml"], "config file nothing.yaml does not exist"),
        (["igpg", "scheduler=pbt"], "scheduler=pbt cannot turn train.generator.tokenizer.chunk_length"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["tune", *arguments, f"out={tmp_path / 'out'}"])
    assert isinstance(done.exception, ConfigError)
    assert expected in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_population_turns_rates_of_its_last_stage_alone(zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = tune_config(zoo_corpus, tmp_path, space={WIDTH: {"choice": [8, 16]}})
    with pytest.raises(ConfigError, match=f"cannot turn {WIDTH} while a run goes on"):
        check_knobs(Pipeline(config))
    rates = {
        f"train.generator.{stage}.optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}
        for stage in ("prior", "task_loss")
    }
    config = tune_config(zoo_corpus, tmp_path, space=rates)
    config.train, config.fixed = "igpg", {"train.num_workers": 0}
    pipeline = Pipeline(config)
    check_knobs(pipeline)
    with pytest.raises(
        ConfigError, match=r"turn train.generator.prior.optimizer.learning_rate: stage 'prior' is over.*'task_loss'"
    ):
        check_stage(pipeline, pipeline.base)
    config.fixed = {"train.num_workers": 0, "train.generator.task_loss.num_steps": 0}
    del config.space["train.generator.prior.optimizer.learning_rate"]
    with pytest.raises(ConfigError, match=r"stage 'task_loss' is over, or off.*'prior'"):
        check_stage(Pipeline(config), Pipeline(config).base)


def test_two_searches_do_not_share_a_folder(zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = tune_config(zoo_corpus, tmp_path)
    with only_one(tmp_path), pytest.raises(InUseError, match=f"{tmp_path} is in use"):
        tune(config)


def test_a_corpus_without_validation_tasks_is_refused(zoo_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    check_corpus(zoo_corpus)
    seen = {name: task for name, task in zoo_corpus.tasks.items() if task.split != "validation"}
    monkeypatch.setattr(zoo_corpus, "tasks", seen)
    with pytest.raises(ConfigError, match=r"set zoo.num_validation_tasks above 0"):
        check_corpus(zoo_corpus)
