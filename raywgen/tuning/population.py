"""Population-based training: weak trials continue from the weights of strong ones, with other rates."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search.sample import Float

from raywgen.compat import population_based_training
from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.generators.bundle import build_generator
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.pipeline import Pipeline, TrialConfigs
from raywgen.tuning.space import Knob

_GENERATOR = "train.generator."
_REAL = ("uniform", "loguniform")


def check_knobs(pipeline: Pipeline) -> None:
    """Checks that every knob may change during a run: a real number of the generator that no shape depends on.

    Raises:
        ConfigError: A knob may not change.
    """
    for knob in pipeline.knobs:
        if not knob.key.startswith(_GENERATOR) or knob.kind not in _REAL or knob.when:
            raise ConfigError(
                f"scheduler=pbt cannot turn {knob.key} while a run goes on: it takes rates and weights of losses "
                f"({_GENERATOR}..., uniform or loguniform, without `when`); use scheduler=asha, or leave it out"
            )


def check_stage(pipeline: Pipeline, configs: TrialConfigs) -> None:
    """Checks that all knobs belong to the last stage, where the rungs lie; an earlier stage is over by then.

    Raises:
        ConfigError: A knob belongs to an earlier stage.
    """
    corpus = Corpus.open(configs.train.corpus)
    train = configs.train
    generator = build_generator(
        train.method, train.generator, measure_normalizers(corpus), data_spec(corpus), train.seed
    )
    last = generator.stages()[-1].name
    for knob in pipeline.knobs:
        group = knob.key.removeprefix(_GENERATOR).split(".")[0]
        if group != last and group in {stage.name for stage in generator.all_stages()}:
            raise ConfigError(
                f"scheduler=pbt cannot turn {knob.key}: stage '{group}' is over, or off, when trials are compared; "
                f"turn knobs of '{last}', or use scheduler=asha"
            )


def check_places(config: TuneConfig, num_workers: int, at_once: int) -> None:
    """Checks that all members fit at once where each trains on workers; single processes take turns.

    Raises:
        ConfigError: Not all of them fit.
    """
    if num_workers and at_once < config.num_trials:
        raise ConfigError(
            f"scheduler=pbt with workers trains all num_trials={config.num_trials} members at once, and {at_once} fit; "
            "set a lower num_trials, or train.num_workers=0 in `fixed`"
        )


def make_scheduler(config: TuneConfig, knobs: tuple[Knob, ...]) -> PopulationBasedTraining:
    """Returns a scheduler that compares all members at every rung, where they wait for each other.

    Values that it changes stay within the space.
    """
    domains = {knob.key: _domain(knob) for knob in knobs}

    def explore(trial_config: dict[str, Any]) -> dict[str, Any]:
        values = {knob.key: min(max(trial_config["knobs"][knob.key], knob.low), knob.high) for knob in knobs}
        return {**trial_config, "knobs": values}

    return population_based_training(
        keep="trial",
        time_attr="rung",
        metric="score",
        mode="max",
        perturbation_interval=1,
        synch=True,
        hyperparam_mutations={"knobs": domains},
        custom_explore_fn=explore,
        log_config=False,
    )


def _domain(knob: Knob) -> Float:
    return tune.loguniform(knob.low, knob.high) if knob.kind == "loguniform" else tune.uniform(knob.low, knob.high)
