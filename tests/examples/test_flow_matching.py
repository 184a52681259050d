"""The example of a user's own generator, on a small real zoo: it trains, resumes, generates, is scored and tuned."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from typer.testing import CliRunner

import raywgen
from examples.flow_matching import FlowConfig, FlowMatching, FlowSampling
from raywgen import cli
from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.evaluate import evaluate
from raywgen.generation import GenerateConfig, generate
from raywgen.generators.bundle import build_generator, save_bundle
from raywgen.training import TrainConfig, TrainingError, launch, load_train_config, read_metrics
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.session import ray_session
from raywgen.training.status import run_status
from raywgen.trust import UntrustedError, trusting
from raywgen.tuning import TuneConfig, tune
from raywgen.tuning.pipeline import Pipeline
from tests.builders import settings_of
from tests.conftest import TINY_ZOO, make_zoo

FLOW = "examples.flow_matching:FlowMatching"
RATE = "train.generator.flow.optimizer.learning_rate"
TRUST = ("examples",)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A zoo of one architecture, all of whose values one perceptron writes at once."""
    zoo = replace(TINY_ZOO, networks=[[64, 6, 2]])
    return make_zoo(zoo, tmp_path_factory.mktemp("zoo") / "corpus")


def flow_config(corpus: Corpus, out: Path, num_steps: int, checkpoint_every: int = 2) -> TrainConfig:
    settings = ["network.width=64", "flow.batch_size=24", "flow.optimizer.learning_rate=0.005"]
    overrides = [f"generator.{setting}" for setting in (*settings, f"flow.num_steps={num_steps}")]
    config = load_train_config(FLOW, [f"corpus={corpus.location}", f"out={out}", "num_workers=0", *overrides])
    return replace(config, log_every=1, checkpoint_every=checkpoint_every)


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    out = tmp_path_factory.mktemp("flow") / "run"
    launch([flow_config(corpus, out, 100, checkpoint_every=50)])
    return out


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


def accuracy(generator: Path, corpus: Corpus, out: Path) -> float:
    """Mean test accuracy of networks that are generated for the tasks that the zoo was trained on."""
    settings = GenerateConfig(generator=str(generator), corpus=corpus.location, tasks="seen", best_of=1, out=str(out))
    with trusting(*TRUST):
        rows = generate(settings)
    return fmean(row.test_accuracy for row in rows if row.test_accuracy is not None)


def test_its_networks_do_what_those_of_an_untrained_generator_do_not(run: Path, corpus: Corpus, tmp_path: Path) -> None:
    settings = settings_of(flow_config(corpus, tmp_path, 1), FlowConfig)
    untrained = build_generator_of_users(settings, corpus)
    save_bundle(untrained, tmp_path / "untrained", {})
    before = accuracy(tmp_path / "untrained", corpus, tmp_path / "before")
    after = accuracy(run, corpus, tmp_path / "after")
    assert before < 0.6
    assert after > before + 0.1


def build_generator_of_users(settings: FlowConfig, corpus: Corpus) -> FlowMatching:
    with trusting(*TRUST):
        built = build_generator(FLOW, settings, measure_normalizers(corpus), data_spec(corpus), seed=0)
    assert isinstance(built, FlowMatching)
    return built


def test_a_stopped_run_goes_on_as_an_undisturbed_one(corpus: Corpus, tmp_path: Path) -> None:
    stopped, straight = (flow_config(corpus, tmp_path / name, 6) for name in ("stopped", "straight"))
    launch([stopped], stop_at=0.5)
    assert len(read_metrics(stopped.out)) == 3
    assert run_status(stopped.out).lines()[0] == f"{stopped.out}: {FLOW}, under way"
    launch([stopped])
    launch([straight])
    losses = [[row["loss"] for row in read_metrics(config.out)] for config in (stopped, straight)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    with pytest.raises(ConfigError, match=rf"method is {FLOW} there and igpg here"):
        launch([TrainConfig(corpus=corpus.location, out=stopped.out, num_workers=0)])


def test_training_from_python_returns_it(corpus: Corpus, tmp_path: Path) -> None:
    trained = raywgen.train(flow_config(corpus, tmp_path / "run", 1), quiet=True)
    assert isinstance(trained.generator, FlowMatching)
    with pytest.raises(UntrustedError, match="add --trust examples"):  # Trust ended with the call.
        raywgen.load(tmp_path / "run")


def test_a_bundle_loads_where_the_user_trusts_the_package(run: Path, corpus: Corpus) -> None:
    with pytest.raises(UntrustedError, match=rf"method '{FLOW}' of .*generator\.json.* add --trust examples"):
        raywgen.load(run)
    generator = raywgen.load(run, trust=TRUST).generator
    assert isinstance(generator, FlowMatching)
    assert generator.method == FLOW
    assert generator.resolve_sampling({"num_steps": 3}) == FlowSampling(num_steps=3)
    with pytest.raises(ConfigError, match="did you mean"):
        generator.resolve_sampling({"num_stepz": 3})
    assert generator.knows(next(iter(corpus.networks.values())).layout)


@pytest.mark.slow
def test_the_command_line_finds_it_in_the_folder_and_asks_for_trust(run: Path, corpus: Corpus, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "raywgen", "generate", f"generator={run}", f"corpus={corpus.location}"]
    command += [f"out={tmp_path / 'networks'}", "tasks=seen", "limit=1", "sampling.num_steps=2", "best_of=1"]
    refused = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    *_, error = refused.stderr.strip().splitlines()
    assert error.startswith(f"error: method '{FLOW}' of {run}")
    assert "add --trust examples" in error
    assert "Traceback" not in refused.stderr
    done = subprocess.run([*command, "--trust", "examples"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "networks").glob("*.safetensors"))) == 1


def test_a_search_of_it_names_its_own_knobs(corpus: Corpus, tmp_path: Path) -> None:
    settings = TuneConfig(corpus=corpus.location, train=FLOW, space={RATE: {"choice": [0.001, 0.01]}})
    pipeline = Pipeline(settings)
    pipeline.check()
    turned = settings_of(pipeline.configs({RATE: 0.01}).train, FlowConfig)
    assert turned.flow.optimizer.learning_rate == 0.01
    wrong = replace(settings, space={"train.generator.prior.dropout": {"uniform": [0, 0.3]}})
    with pytest.raises(ConfigError, match=rf"a search of {FLOW} takes the settings of that method alone"):
        Pipeline(wrong).check()


@pytest.mark.parametrize("words", [["tune", FLOW], ["tune", "zoo=digits", f"method={FLOW}"]])
def test_a_search_that_is_not_shipped_says_how_to_write_one(words: list[str]) -> None:
    result = CliRunner().invoke(cli.app, words)
    assert isinstance(result.exception, ConfigError)
    assert f"train={FLOW}" in str(result.exception)
    assert "space." in str(result.exception)


@pytest.mark.slow
def test_it_is_scored_beside_the_baselines(run: Path, corpus: Corpus, tmp_path: Path) -> None:
    settings = EvaluateConfig(
        generator=str(run), corpus=corpus.location, out=str(tmp_path), best_of=2, num_tasks=3, finetune_epochs=[1]
    )
    with trusting(*TRUST):
        rows = {cell.row for cell in evaluate(settings).ladder}
    assert {"original", "generated", "nearest_loss"} <= rows


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_it_is_tuned_and_trained_by_workers(corpus: Corpus, tmp_path: Path) -> None:
    settings = TuneConfig(
        corpus=corpus.location,
        train=FLOW,
        fixed={"train.num_workers": 0, "train.generator.flow.num_steps": 8, "train.generator.network.width": 16},
        space={RATE: {"choice": [0.001, 0.01]}},
        num_trials=2,
        max_concurrent=1,
        rungs=[1.0],
        out=str(tmp_path / "tune"),
    )
    assert len(tune(settings).rows) == 2
    best = load_train_config(str(tmp_path / "tune" / "best.yaml"), ["num_workers=2"])
    launch([best])
    assert isinstance(raywgen.load(best.out, trust=TRUST).generator, FlowMatching)


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_workers_that_cannot_import_it_are_named_in_one_line(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far_flow.py").write_text((Path(__file__).parents[2] / "examples" / "flow_matching.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))  # Too late for the session's workers.
    overrides = [f"corpus={corpus.location}", f"out={tmp_path / 'run'}", "num_workers=2", "max_failures=0"]
    with pytest.raises(TrainingError, match=r"workers cannot import 'far_flow'.*install it on all nodes") as caught:
        launch([load_train_config("far_flow:FlowMatching", overrides)])
    assert "\n" not in str(caught.value)
