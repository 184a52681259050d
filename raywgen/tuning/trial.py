"""One trial: prepare the corpus, train in rungs, judge the generator at each; begun again, it goes on.

A trial that Ray stops is blocked inside `report` for good, so nothing may be held there.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from raywgen.corpus import Corpus
from raywgen.corpus.storage import absolute
from raywgen.locks import waiting
from raywgen.training import (
    BUNDLE,
    DivergedError,
    TrainConfig,
    TrainingError,
    launch,
    read_metrics,
    read_stages,
    snapshot_folder,
)
from raywgen.trust import trusting
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.objective import check_corpus, judge
from raywgen.tuning.pipeline import Pipeline, Plan
from raywgen.tuning.results import CORPORA, Score, TrialState, trial_folder
from raywgen.zoo import train_zoo

_PAUSE = "pause.json"
_LOCK = "lock"


def run_trial(told: dict[str, Any], settings: TuneConfig, pipeline: Pipeline, trust: tuple[str, ...] = ()) -> None:
    """What Ray Tune runs.

    Args:
        told: `trial`, its name, and `knobs`, their values.
        settings: The search; paths mean the same on every node.
        pipeline: Of the search.
        trust: What recipes may name, as `trusting` takes it.
    """
    with trusting(*trust):
        _run_trial(told, settings, pipeline)


def _run_trial(told: dict[str, Any], settings: TuneConfig, pipeline: Pipeline) -> None:
    from ray import tune

    torch.set_num_threads(1)  # As many as a trial holds CPUs.
    folder = trial_folder(settings.out, told["trial"])
    folder.mkdir(parents=True, exist_ok=True)
    with waiting(folder / _LOCK):
        state, done = _begin(folder, told, tune.get_checkpoint())
    # A population is told each rung once; another search knows by itself what it was told before.
    for rung in range(done + 1, len(settings.rungs) + 1):
        score = state.at(rung)
        if score is None:
            with waiting(folder / _LOCK):
                state = _climb(state, rung, settings, pipeline)
            score = state.scores[-1]
        last = len(settings.rungs) if state.failed else rung
        result = {"score": score.score, "rung": last, "time": rung_time(last, settings), "steps": score.steps}
        if settings.scheduler == "pbt":
            _report_with_pause(tune, result, state, settings)
        else:
            tune.report(result)
        if state.failed:
            return


def rung_time(rung: int, settings: TuneConfig) -> float:
    """What ASHA takes for time: its milestones are powers of the reduction, and so each rung is one."""
    return settings.reduction ** (rung - 1)


def run_folder(settings: TuneConfig, state: TrialState) -> str:
    """Of the trial's training, one for each generation."""
    return str(trial_folder(settings.out, state.trial) / f"run-{state.generation}")


def plan_of(state: TrialState, pipeline: Pipeline, settings: TuneConfig) -> Plan:
    """The trial's configs with all paths."""
    plan = pipeline.plan(state.knobs)
    train = replace(plan.train, out=run_folder(settings, state))
    if plan.zoo is not None:
        corpus = f"{settings.out}/{CORPORA}/{plan.corpus_name}"
        plan, train = replace(plan, zoo=replace(plan.zoo, out=corpus)), replace(train, corpus=corpus)
    return replace(plan, train=train)


def prepare(plan: Plan, distributed: bool, **told: Any) -> Corpus:
    """The corpus, made by whoever comes first while others of the same recipe wait."""
    if plan.zoo is None:
        corpus = Corpus.open(plan.train.corpus)
    else:
        with waiting(Path(f"{plan.zoo.out}.{_LOCK}")):
            corpus = train_zoo(plan.zoo, plan.zoo.out, distributed=distributed, **told)
    check_corpus(corpus)
    return corpus


def _begin(folder: Path, told: dict[str, Any], checkpoint: Any) -> tuple[TrialState, int]:
    """The trial's state, and the rungs of it that its scheduler knows."""
    state = TrialState.load(folder) or TrialState(trial=told["trial"], knobs=dict(told["knobs"]))
    done = 0
    if checkpoint is not None:
        with checkpoint.as_directory() as place:
            pause: dict[str, Any] = json.loads((Path(place) / _PAUSE).read_text())
        done = pause["rung"]
        if pause["trial"] != state.trial or dict(told["knobs"]) != state.knobs:
            # It goes on from a better one, with rates of its own.
            state = TrialState(
                trial=state.trial,
                knobs=dict(told["knobs"]),
                scores=tuple(Score(**score) for score in pause["scores"]),
                generation=state.generation + 1,
                start=pause["folder"],
            )
    elif told.get("is_told"):
        done = len(state.scores)
    state.save(folder)
    return state, done


def _climb(state: TrialState, rung: int, settings: TuneConfig, pipeline: Pipeline) -> TrialState:
    """Up to the next rung, or to what keeps it from there."""
    begin = time.monotonic()
    before = state.scores[-1].seconds if state.scores else 0.0
    share, steps = settings.rungs[rung - 1], 0
    try:
        plan = plan_of(state, pipeline, settings)
        corpus = prepare(plan, distributed=plan.train.num_workers > 0)
        launch([plan.train], stop_at=share, init_from=state.start)
        steps = steps_taken(plan.train, share)
        bundle = snapshot_folder(plan.train.out, share) if share < 1 else Path(plan.train.out) / BUNDLE
        score = judge(bundle, corpus, plan.train.shot, settings.objective)
    except (DivergedError, TrainingError, ValueError) as error:
        state, score = replace(state, failed=str(error)), 0.0
    seconds = round(before + time.monotonic() - begin, 3)
    state = state.with_score(Score(rung=rung, score=score, steps=steps, seconds=seconds))
    state.save(trial_folder(settings.out, state.trial))
    return state


def steps_taken(train: TrainConfig, share: float) -> int:
    """Optimiser steps of a run up to a share of its last stage, by its metric log."""
    logged = {row["stage"] for row in read_metrics(train.out)}
    steps = [stage.num_steps for stage in read_stages(train.out) if stage.name in logged]
    return sum(steps[:-1]) + math.ceil(share * steps[-1]) if steps else 0


def _report_with_pause(tune: Any, result: dict[str, Any], state: TrialState, settings: TuneConfig) -> None:
    """With what another trial needs to go on from here; weights stay where they are."""
    share = settings.rungs[result["rung"] - 1]
    pause = {
        "trial": state.trial,
        "rung": result["rung"],
        "scores": [asdict(score) for score in state.scores],
        "folder": str(snapshot_folder(run_folder(settings, state), share)),
    }
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / _PAUSE).write_text(json.dumps(pause))
        tune.report(result, checkpoint=tune.Checkpoint.from_directory(place))


def settings_everywhere(settings: TuneConfig) -> TuneConfig:
    """With paths that mean the same in a trial, which Ray starts in a folder of its own."""
    corpus = absolute(settings.corpus) if settings.corpus else ""
    return replace(settings, out=absolute(settings.out), corpus=corpus)
