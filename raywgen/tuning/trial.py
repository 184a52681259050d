"""One trial: prepare the corpus, train rung by rung, judge the generator at each; a restarted trial resumes.

A trial that Ray stops stays blocked inside `report`, so no lock may be held there.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from ray import tune

from raywgen.corpus import Corpus
from raywgen.locations import absolute, joined, location_parts
from raywgen.locks import waiting
from raywgen.training import (
    BUNDLE,
    DeviceMemoryError,
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
from raywgen.tuning.pipeline import Pipeline, TrialConfigs
from raywgen.tuning.results import CORPORA, RungScore, TrialState, trial_folder
from raywgen.zoo import train_zoo

_PAUSE = "pause.json"
_LOCK = "lock"


def run_trial(
    trial_config: dict[str, Any], settings: TuneConfig, pipeline: Pipeline, trust: tuple[str, ...] = ()
) -> None:
    """Trains and judges one trial; this is the function that Ray Tune runs.

    Args:
        trial_config: The trial's name as `trial` and the values of its knobs as `knobs`; with `skip_reported` the
            scheduler has kept the results of earlier rungs, which are then not reported again.
        settings: The search, with paths that mean the same on every node.
        pipeline: Pipeline of the search.
        trust: Packages that recipes may name, as `trusting` takes them.
    """
    with trusting(*trust):
        _run_trial(trial_config, settings, pipeline)


def _run_trial(trial_config: dict[str, Any], settings: TuneConfig, pipeline: Pipeline) -> None:
    torch.set_num_threads(1)  # A trial holds one CPU.
    folder = trial_folder(settings.out, trial_config["trial"])
    with waiting(joined(folder, _LOCK)):
        state, done = _begin(folder, trial_config, tune.get_checkpoint())
    # The scheduler of a population takes each rung once; the other searches recognise repeated results.
    for rung in range(done + 1, len(settings.rungs) + 1):
        score = state.at(rung)
        if score is None:
            with waiting(joined(folder, _LOCK)):
                state = _climb(state, rung, settings, pipeline)
            score = state.scores[-1]
        last = len(settings.rungs) if state.failed else rung
        result = {"score": score.score, "rung": last, "time": rung_time(last, settings), "steps": score.steps}
        if settings.scheduler == "pbt":
            _report_with_pause(result, state, settings)
        else:
            tune.report(result)
        if state.failed:
            return


def rung_time(rung: int, settings: TuneConfig) -> float:
    """Returns the time that ASHA sees at a rung: its milestones are powers of the reduction."""
    return settings.reduction ** (rung - 1)


def run_folder(settings: TuneConfig, state: TrialState) -> str:
    """Returns the run folder of the trial's training; each generation has its own."""
    return joined(trial_folder(settings.out, state.trial), f"run-{state.generation}")


def trial_configs(state: TrialState, pipeline: Pipeline, settings: TuneConfig) -> TrialConfigs:
    """Returns the trial's configs with all paths filled in."""
    configs = pipeline.configs(state.knobs)
    # The search counts what a trial takes, so a trial must not choose for itself.
    device = "cpu" if configs.train.device == "auto" else configs.train.device
    train = replace(configs.train, out=run_folder(settings, state), device=device)
    if configs.zoo is not None:
        corpus = joined(settings.out, f"{CORPORA}/{configs.corpus_name}")
        configs, train = replace(configs, zoo=replace(configs.zoo, out=corpus)), replace(train, corpus=corpus)
    return replace(configs, train=train)


def prepare(configs: TrialConfigs, distributed: bool, on_progress: Callable[[int, int], None] | None = None) -> Corpus:
    """Opens the corpus; the first trial of a recipe makes it while others wait."""
    if configs.zoo is None:
        corpus = Corpus.open(configs.train.corpus)
    else:
        with waiting(_lock_of(configs.zoo.out)):
            corpus = train_zoo(configs.zoo, configs.zoo.out, on_progress, distributed=distributed)
    check_corpus(corpus)
    return corpus


def _lock_of(corpus: str) -> str:
    base, mark, query = location_parts(corpus)
    return f"{base}.{_LOCK}{mark}{query}"


def _begin(folder: str, trial_config: dict[str, Any], checkpoint: tune.Checkpoint | None) -> tuple[TrialState, int]:
    """Returns the trial's state, and how many of its rungs the scheduler knows."""
    knobs = dict(trial_config["knobs"])
    state = TrialState.load(folder) or TrialState(trial=trial_config["trial"], knobs=knobs)
    done = 0
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            pause: dict[str, Any] = json.loads((Path(directory) / _PAUSE).read_text())
        done = pause["rung"]
        if pause["trial"] != state.trial or knobs != state.knobs:
            # The trial continues from a better one, with rates of its own.
            state = TrialState(
                trial=state.trial,
                knobs=knobs,
                scores=tuple(RungScore(**score) for score in pause["scores"]),
                generation=state.generation + 1,
                start=pause["folder"],
            )
    elif trial_config.get("skip_reported"):
        done = len(state.scores)
    state.save(folder)
    return state, done


def _climb(state: TrialState, rung: int, settings: TuneConfig, pipeline: Pipeline) -> TrialState:
    """Trains and judges the trial up to the next rung; a failure is kept in its state."""
    begin = time.monotonic()
    before = state.scores[-1].seconds if state.scores else 0.0
    share, steps = settings.rungs[rung - 1], 0
    try:
        configs = trial_configs(state, pipeline, settings)
        corpus = prepare(configs, distributed=configs.train.max_workers > 0)
        launch([configs.train], stop_at=share, init_from=state.start)
        steps = steps_taken(configs.train, share)
        bundle = snapshot_folder(configs.train.out, share) if share < 1 else joined(configs.train.out, BUNDLE)
        score = judge(bundle, corpus, configs.train.shot, settings.objective)
    except (DeviceMemoryError, DivergedError, TrainingError, ValueError) as error:
        state, score = replace(state, failed=str(error)), 0.0
    seconds = round(before + time.monotonic() - begin, 3)
    state = state.with_score(RungScore(rung=rung, score=score, steps=steps, seconds=seconds))
    state.save(trial_folder(settings.out, state.trial))
    return state


def steps_taken(train: TrainConfig, share: float) -> int:
    """Returns the optimiser steps of a run up to a share of its last stage."""
    logged = {row["stage"] for row in read_metrics(train.out)}
    steps = [stage.num_steps for stage in read_stages(train.out) if stage.name in logged]
    return sum(steps[:-1]) + math.ceil(share * steps[-1]) if steps else 0


def _report_with_pause(result: dict[str, Any], state: TrialState, settings: TuneConfig) -> None:
    """Reports a result with what another trial needs to continue from here; weights stay where they are."""
    share = settings.rungs[result["rung"] - 1]
    pause = {
        "trial": state.trial,
        "rung": result["rung"],
        "scores": [asdict(score) for score in state.scores],
        "folder": snapshot_folder(run_folder(settings, state), share),
    }
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / _PAUSE).write_text(json.dumps(pause))
        tune.report(result, checkpoint=tune.Checkpoint.from_directory(directory))


def settings_everywhere(settings: TuneConfig) -> TuneConfig:
    """Returns the search with absolute paths, which mean the same in trials that Ray starts in other folders."""
    corpus = absolute(settings.corpus) if settings.corpus else ""
    return replace(settings, out=absolute(settings.out), corpus=corpus)
