"""The bytes that a search writes, from below, so that a disk without room is noticed before Ray starts."""

from __future__ import annotations

from raywgen.out_folder import check_room, has_room
from raywgen.training.plan.config import PlanConfig
from raywgen.training.plan.corpus import planned_corpus
from raywgen.training.plan.shapes import valueless_generator
from raywgen.training.plan.valueless import valueless
from raywgen.training.run_bytes import least_run_bytes
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.pipeline import Pipeline, TrialConfigs
from raywgen.zoo.plan import zoo_bytes


def check_search_room(pipeline: Pipeline, config: TuneConfig) -> None:
    """Refuses a disk without room for the corpus that all trials share, or for each trial up to its first rung.

    Trials are left out where the space, the budget of steps or a corpus that is still to be made decides on their size
    or number.

    Raises:
        OutError: There is no room.
        CorpusError, TaskError: The corpus cannot be read, or its recipe asks for more tasks than there are.
    """
    zoo = pipeline.base.zoo
    if zoo is not None:
        if not pipeline.turns_zoo:
            check_room(config.out, zoo_bytes(zoo))
        return
    if config.max_steps:
        return
    each = _trial_bytes(pipeline.base, config)
    num_bytes = config.num_trials * each
    if not has_room(config.out, num_bytes) and all(
        _trial_bytes(pipeline.configs(values), config) == each for _, values in pipeline.corners()
    ):
        check_room(config.out, num_bytes, f"for {config.num_trials} trials")


def _trial_bytes(configs: TrialConfigs, config: TuneConfig) -> int:
    corpus = planned_corpus(configs.train, PlanConfig())
    with valueless():
        return least_run_bytes(valueless_generator(configs.train, corpus), configs.train, config.rungs[0])
