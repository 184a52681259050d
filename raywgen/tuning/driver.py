"""Runs a search on Ray Tune, and resumes one that was interrupted."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from raywgen.config import ConfigError, to_yaml
from raywgen.evaluation.report import write_report
from raywgen.locations import joined
from raywgen.locks import only_one
from raywgen.out_folder import checked_out
from raywgen.progress import Reporter, plain
from raywgen.stops import keeping
from raywgen.storage import Storage
from raywgen.stored_config import read_stored_config
from raywgen.training.session import ray_session
from raywgen.trust import entry_point, named_in, trusted, trusting
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.live import LiveTable
from raywgen.tuning.pipeline import Pipeline
from raywgen.tuning.population import check_knobs, check_places, check_stage, make_scheduler
from raywgen.tuning.report import PAGES
from raywgen.tuning.resources import check_resources, cluster_nodes
from raywgen.tuning.results import (
    TrialRow,
    TrialState,
    TuneError,
    TuneResult,
    best_row,
    row_of,
    trial_folder,
    write_table,
)
from raywgen.tuning.room import check_search_room
from raywgen.tuning.search import COMPLETE, SUGGEST, RecordedASHA, RecordedSearch, SearchLog, population
from raywgen.tuning.space import Values
from raywgen.tuning.tensorboard import write_tensorboard
from raywgen.tuning.trial import prepare, run_trial, settings_everywhere, trial_configs

if TYPE_CHECKING:
    from ray.tune import Tuner

CONFIG, BEST, BEST_ZOO = "config.yaml", "best.yaml", "best-zoo.yaml"
_RAY = "ray"
_MOST_FAILURES = 2


@entry_point
def tune(config: TuneConfig, reporter: Reporter | None = None) -> TuneResult:
    """Searches, and leaves the best config, a table, a report and TensorBoard's files in `config.out`.

    The same call made again resumes where the last one stopped; with a larger `num_trials` it extends the search.

    Args:
        config: The search.
        reporter: Prints progress.

    Raises:
        OutError: Nothing can or should be written to `out`, or its disk has no room for the search; nothing has begun.
        ConfigError: Something is wrong with the config, or the cluster can never run a trial; nothing has begun.
        CorpusError: The corpus cannot be read or made.
        TuneError: No trial could be judged.
        InUseError: Another process is searching in this folder.
    """
    reporter = reporter or Reporter()
    config = replace(config, out=checked_out(config.out, TuneConfig.out))
    pipeline = Pipeline(config)
    pipeline.check()
    settings = settings_everywhere(config)
    if config.scheduler == "pbt":
        check_knobs(pipeline)
    # Without this Ray Tune would treat Ctrl-C as the end of the search.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    kept = keeping(f"{config.out} keeps all trials and their checkpoints; the same command goes on with the search")
    with kept, trusting(*named_in(pipeline.base)), only_one(settings.out):
        is_over = config.scheduler != "pbt" and len(SearchLog(settings.out).names(COMPLETE)) >= config.num_trials
        if not is_over:
            check_search_room(pipeline, config)
        _keep_config(config)
        if is_over:
            return _finish(pipeline, config)
        workers = pipeline.base.train.max_workers
        # A machine that can train can tune: the waiting trial and its data tasks get logical CPUs beyond the real ones.
        with ray_session(2 if workers else 0, dashboard=workers > 0):
            at_once = check_resources(cluster_nodes(pipeline.base.train), pipeline.base.train, config.max_concurrent)
            if config.scheduler == "pbt":
                check_places(config, workers, at_once)
            _prepare_first(pipeline, settings, reporter)
            log = SearchLog(settings.out)
            table = LiveTable(settings, reporter.console)
            over = set(log.names(COMPLETE))
            reporter.console.print(
                f"[bold]tune[/bold]: {config.num_trials} trials, {at_once} at once, into {plain(config.out)}",
                highlight=False,
                soft_wrap=True,
            )
            with table.shown({name: name in over for name in log.names(SUGGEST)}):
                _run(pipeline, settings, at_once, table)
    return _finish(pipeline, config)


def _keep_config(config: TuneConfig) -> None:
    """Saves the config, and refuses the folder of another search; the numbers of trials may change."""
    storage, kept = Storage.at(config.out), joined(config.out, CONFIG)

    def identity(search: TuneConfig) -> str:
        return to_yaml(replace(search, num_trials=8, max_steps=0, max_concurrent=0))

    if storage.size(CONFIG) is not None and identity(read_stored_config(TuneConfig, kept)) != identity(config):
        raise ConfigError(f"{config.out} holds another search ({kept}); give another `out`, or delete the folder")
    storage.write(CONFIG, to_yaml(config).encode())


def _prepare_first(pipeline: Pipeline, settings: TuneConfig, reporter: Reporter) -> None:
    """Makes a corpus that all trials share over the whole cluster, before trials occupy parts of it."""
    if pipeline.turns_zoo:
        return
    configs = trial_configs(TrialState(trial="", knobs={}), pipeline, settings)
    if configs.zoo is None:
        prepare(configs, distributed=False)
    else:
        with reporter.step("zoo", f"train networks into {configs.zoo.out}") as bar:
            prepare(configs, distributed=True, on_progress=bar.update)
    if settings.scheduler == "pbt":
        check_stage(pipeline, configs)


def _run(pipeline: Pipeline, settings: TuneConfig, at_once: int, table: LiveTable) -> None:
    """Runs the search to its end, and resumes it where Ray Tune itself fails because memory ran out.

    Raises:
        TuneError: It failed too often.
    """
    from ray.exceptions import OutOfMemoryError

    for _ in range(1 + _MOST_FAILURES):
        try:
            with _quiet_tune():
                Storage.at(settings.out).delete(_RAY)
                tuner = _tuner(pipeline, settings, at_once, table)
                if tuner is not None:
                    tuner.fit()
            return
        except RuntimeError as error:
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
    raise TuneError(
        f"{settings.out}: trials were stopped {1 + _MOST_FAILURES} times because the memory of their node ran out; set "
        f"max_concurrent below {at_once}, or make the trials smaller, and give the same command again"
    )


def _tuner(pipeline: Pipeline, settings: TuneConfig, at_once: int, table: LiveTable) -> Tuner | None:
    """Builds Ray's tuner for the rest of the search; None where nothing is left."""
    from ray import tune as ray_tune

    log, storage = SearchLog(settings.out), Storage.at(settings.out)
    search: dict[str, Any]
    space: dict[str, Any] | None = None
    most: int | None = at_once
    if settings.scheduler == "pbt":
        members = _unfinished(population(settings, pipeline.knobs, log), settings)
        if not members:
            return None
        values = {knob.key: ray_tune.sample_from(partial(_member_value, members, knob.key)) for knob in pipeline.knobs}
        most = None  # All members must exist to be compared; those that find no CPU wait their turn.
        space = {"trial": ray_tune.grid_search(list(members)), "skip_reported": True, "knobs": values}
        search = {"scheduler": make_scheduler(settings, pipeline.knobs), "num_samples": 1}
    else:
        search = {"search_alg": RecordedSearch(settings, pipeline.knobs, log), "num_samples": -1}
        if settings.scheduler == "asha":
            search["scheduler"] = RecordedASHA(settings, log)
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(run_trial, settings=settings, pipeline=pipeline, trust=trusted()),
        ray_tune.PlacementGroupFactory([{"CPU": 1}]),
    )
    return ray_tune.Tuner(
        trainable,
        param_space=space,
        tune_config=ray_tune.TuneConfig(max_concurrent_trials=most, reuse_actors=True, **search),
        run_config=ray_tune.RunConfig(
            name="session",
            storage_path=storage.path(_RAY),
            storage_filesystem=None if storage.is_local else storage.filesystem,
            stop={"rung": len(settings.rungs)} if settings.scheduler == "pbt" else None,
            failure_config=ray_tune.FailureConfig(max_failures=_MOST_FAILURES),
            callbacks=[table],
            verbose=0,
        ),
    )


def _unfinished(members: dict[str, Values], settings: TuneConfig) -> dict[str, Values]:
    """Returns the members of a population that have not reached the last rung."""
    rungs = len(settings.rungs)
    states = {name: TrialState.load(trial_folder(settings.out, name)) for name in members}
    return {
        name: values
        for name, values in members.items()
        if (state := states[name]) is None or row_of(state, rungs, is_over=False).status == "unfinished"
    }


def _member_value(members: dict[str, Values], key: str, spec: Any) -> Any:
    return members[spec.config.trial][key]


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Switches off Ray's own tables, loggers, change of folder and handling of Ctrl-C."""
    changed = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def rows_of(settings: TuneConfig) -> list[TrialRow]:
    """Returns a row for every trial that has begun."""
    log = SearchLog(settings.out)
    over, rows = set(log.names(COMPLETE)), []
    for event in log.events:
        if event["event"] == SUGGEST:
            state = TrialState.load(trial_folder(settings.out, event["trial"]))
            state = state or TrialState(trial=event["trial"], knobs=event["knobs"])
            rows.append(row_of(state, len(settings.rungs), event["trial"] in over))
    return rows


def _finish(pipeline: Pipeline, config: TuneConfig) -> TuneResult:
    rows = rows_of(config)
    write_table(rows, config.out)
    result = TuneResult(out=config.out, rows=tuple(rows), best=best_row(rows), num_rungs=len(config.rungs))
    configs = trial_configs(TrialState(trial=result.best.trial, knobs=result.best.knobs), pipeline, config)
    storage = Storage.at(config.out)
    storage.write(BEST, to_yaml(replace(configs.train, out=joined(config.out, "best"))).encode())
    if configs.zoo is not None:
        storage.write(BEST_ZOO, to_yaml(configs.zoo).encode())
    write_tensorboard(rows, config.out)
    write_report(config.out, PAGES)
    return result
