"""Population-based training: weak trials go on from the weights of strong ones, with other rates."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.generators import StageConfig
from raywgen.generators.bundle import build_generator
from raywgen.training.data import data_spec, measure_references
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.pipeline import Pipeline, Plan
from raywgen.tuning.space import Knob

_GENERATOR = "train.generator."
_REAL = ("uniform", "loguniform")


def check_knobs(pipeline: Pipeline) -> None:
    """Only what may change while a run goes on: real numbers of the generator, which no shape depends on.

    Raises:
        ConfigError: A knob may not.
    """
    for knob in pipeline.knobs:
        if not knob.key.startswith(_GENERATOR) or knob.kind not in _REAL or knob.when:
            raise ConfigError(
                f"scheduler=pbt cannot turn {knob.key} while a run goes on: it takes rates and weights of losses "
                f"({_GENERATOR}..., uniform or loguniform, without `when`); use scheduler=asha, or leave it out"
            )


def check_stage(pipeline: Pipeline, plan: Plan) -> None:
    """Rungs lie in the last stage, so that a knob of an earlier one would be turned when it is over.

    Raises:
        ConfigError: A knob is of an earlier stage.
    """
    corpus = Corpus.open(plan.train.corpus)
    train = plan.train
    generator = build_generator(
        train.method, train.generator, measure_references(corpus), data_spec(corpus), train.seed
    )
    *earlier, last = [stage.name for stage in generator.stages()]
    for knob in pipeline.knobs:
        group = knob.key.removeprefix(_GENERATOR).split(".")[0]
        is_stage = isinstance(getattr(train.generator, group, None), StageConfig)
        if group in earlier or (is_stage and group != last):
            raise ConfigError(
                f"scheduler=pbt cannot turn {knob.key}: stage '{group}' is over, or off, when trials are compared; "
                f"turn knobs of '{last}', or use scheduler=asha"
            )


def make_scheduler(config: TuneConfig, knobs: tuple[Knob, ...]) -> PopulationBasedTraining:
    """Compares trials at every rung; values stay within the space."""
    domains = {knob.key: _domain(knob) for knob in knobs}

    def explore(told: dict[str, Any]) -> dict[str, Any]:
        values = {knob.key: min(max(told["knobs"][knob.key], knob.low), knob.high) for knob in knobs}
        return {**told, "knobs": values}

    return PopulationBasedTraining(
        time_attr="rung",
        metric="score",
        mode="max",
        perturbation_interval=1,
        hyperparam_mutations={"knobs": domains},
        custom_explore_fn=explore,
        log_config=False,
    )


def _domain(knob: Knob) -> Any:
    return tune.loguniform(knob.low, knob.high) if knob.kind == "loguniform" else tune.uniform(knob.low, knob.high)
