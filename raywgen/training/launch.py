"""Launches runs: in this process, or on Ray Train workers with DeepSpeed.

One launch may hold several runs, one after another on the same workers: starting workers costs more than
training a small generator. The same call made again goes on where the last one stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from raywgen.config import ConfigError, save_config
from raywgen.corpus import Corpus
from raywgen.corpus.storage import absolute
from raywgen.generators import DataSpec
from raywgen.generators.bundle import ENCODER, build_generator
from raywgen.locks import only_one
from raywgen.stops import Stopped, stop_signals
from raywgen.tasks.encoders import copy_encoder, encoder_kind
from raywgen.tasks.preprocessing import InputForm, input_form
from raywgen.training.checkpoints import RunCheckpoints
from raywgen.training.config import TrainConfig, flatten, read_train_config
from raywgen.training.data import data_digest, data_spec, has_tasks, measure_normalizers
from raywgen.training.loop import BUNDLE
from raywgen.training.resource_check import check_run, connected_nodes, worker_bundles
from raywgen.training.runlog import read_metrics
from raywgen.training.runs import Launch, is_done, restore, warn
from raywgen.training.workers import train_here, train_on_ray
from raywgen.trust import entry_point
from raywgen.weights import NormalizerTable

OnProgress = Callable[[str, str, int, int, dict[str, Any]], None]
"""Called with run folder, stage, step, steps of the stage, and the newest row of the metric log."""


CONFIG = "config.yaml"
_POLL_SECONDS = 0.5
_MOST_NAMED = 3


@entry_point
def launch(
    configs: Sequence[TrainConfig], on_progress: OnProgress | None = None, *, until: float = 1.0, start: str = ""
) -> None:
    """Trains generators one after another; those already trained are left as they are.

    Args:
        configs: Runs that share a corpus and workers.
        on_progress: Told of every new row of the metric logs.
        until: Share of the last stage's steps after which a run pauses: its generator then lies in `pause_folder`, and
            the same call with a larger share goes on there.
        start: Pause of another run, from which one without a checkpoint of its own begins.

    Raises:
        ConfigError: A run folder holds another run, or a batch does not divide among the workers.
        CorpusError: The corpus cannot be read.
        ClusterError: The cluster has no room for the workers and never will.
        InUseError: Another process works on a run folder.
        TrainingError: Workers failed too often.
        Stopped: A signal came, and what could be kept is kept.
    """
    _check(configs)
    left = [config for config in configs if not is_done(config)]
    if not left:
        return
    _refuse_misfit(left[0])
    corpus = Corpus.open(left[0].corpus)
    normalizers, data = measure_normalizers(corpus), data_spec(corpus)
    if not has_tasks(corpus):
        _refuse_tasks(left, corpus, normalizers, data)
    with ExitStack() as stack:
        for config in left:
            stack.enter_context(only_one(config.out))
        _check(left)  # Whoever held a folder a moment ago may have begun another run there.
        inputs = _inputs(corpus)
        for config in left:
            save_config(config, Path(config.out) / CONFIG)
            if inputs is not None and inputs.encoder and encoder_kind(inputs.encoder) == "folder":
                copy_encoder(inputs.encoder, str(Path(config.out) / BUNDLE / ENCODER))
        facts = [_facts(config, inputs) for config in left]
        told = Launch(
            configs=left,
            facts=facts,
            normalizers=normalizers,
            data=data,
            until=until,
            start=start,
            snapshot=corpus.snapshot,
        )
        with _Watcher(left, on_progress, normalizers, data):
            _train(told, corpus)


def _train(told: Launch, corpus: Corpus) -> None:
    """Trains until all runs are done, or a signal asks to stop.

    Raises:
        Stopped: A signal came; the newest checkpoint says where the same call goes on.
    """
    with stop_signals(told.configs[0].grace_seconds) as stop:
        try:
            if told.configs[0].num_workers == 0:
                train_here(told, stop)
            else:
                _look_at_checkpoints(told, corpus)
                train_on_ray(told, stop)
            if stop.number is not None and not all(is_done(config) for config in told.configs):
                raise Stopped(stop.number)
        except Stopped as stopped:
            stopped.kept = _kept(told)
            raise


def _look_at_checkpoints(told: Launch, corpus: Corpus) -> None:
    """Says here, before any worker starts, which checkpoints workers will pass over."""
    digest = data_digest(corpus)
    for config in told.configs:
        restore(config, told.build(config), digest, told.start, warn)


def _kept(told: Launch) -> str:
    for config in told.configs:
        if not is_done(config):
            position = RunCheckpoints(config.out).position()
            if position is None:
                return f"{config.out} has no checkpoint yet; the same command begins again"
            names = [*(stage.name for stage in told.build(config).stages()), "all"]
            where = f"step {position[1]} of stage '{names[position[0]]}'"
            return f"{config.out} keeps a checkpoint at {where}; the same command goes on from there"
    return "all generators are trained"


def _check(configs: Sequence[TrainConfig]) -> None:
    for config in configs:
        if different := _differences(config):
            raise ConfigError(
                f"{config.out} holds a run with another config ({Path(config.out) / CONFIG}): {'; '.join(different)}; "
                "give another `out`, or delete the folder"
            )
        if (config.corpus, config.num_workers) != (configs[0].corpus, configs[0].num_workers):
            raise ConfigError("runs of one launch must share `corpus` and `num_workers`")
        for stage in vars(config.generator).values():
            batch_size = getattr(stage, "batch_size", 0)
            if batch_size % max(1, config.num_workers):
                raise ConfigError(
                    f"batch_size={batch_size} does not divide among num_workers={config.num_workers}; "
                    "give a multiple, so that every worker takes an equal part"
                )


def _refuse_misfit(config: TrainConfig) -> None:
    if config.num_workers == 0:
        return
    import ray

    if ray.is_initialized():
        check_run(config, connected_nodes(worker_bundles(config)))


def _refuse_tasks(configs: Sequence[TrainConfig], corpus: Corpus, normalizers: NormalizerTable, data: DataSpec) -> None:
    """Before anything is trained that could not be trained to the end."""
    for config in configs:
        stages = build_generator(config.method, config.generator, normalizers, data, config.seed).stages()
        is_useful_without = any(not stage.needs.tasks for stage in stages)
        for stage in stages:
            if stage.needs.tasks:
                is_left_out = stage.is_optional and is_useful_without
                off = f"generator.{stage.name}.num_steps=0 leaves it out, or " if is_left_out else ""
                raise ConfigError(
                    f"{corpus.location} holds weights alone, and stage '{stage.name}' of {config.method} needs to know "
                    f"what networks do and how they are built: {off}say so by `raywgen corpus describe`"
                )


def _differences(config: TrainConfig) -> list[str]:
    """In which keys the run of the folder is another one, as `key: there ..., here ...`."""
    path = Path(config.out) / CONFIG
    if not path.is_file():
        return []
    there, here = _identity(read_train_config(path)), _identity(config)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return [f"{name} is {there.get(name)} there and {here.get(name)} here" for name in names[:_MOST_NAMED]]


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What may not change when a run goes on: all but where it lies, who trains, and how often something is kept.

    Checkpoints fit any workers. Whether the corpus still holds the same is seen by their digest.
    """
    where = {"out": "", "num_workers": 1, "zero_stage": 0, "use_gpu": False, "max_failures": 0, "grace_seconds": 1.0}
    told = replace(config, **where, checkpoint_every=1, log_every=1, validate_every=1, corpus=absolute(config.corpus))
    return dict(flatten(asdict(told)))


def _facts(config: TrainConfig, inputs: InputForm | None) -> dict[str, Any]:
    told = {"corpus": config.corpus, "seed": config.seed, "torch": torch.__version__}
    return told if inputs is None else told | {"inputs": asdict(inputs)}


def _inputs(corpus: Corpus) -> InputForm | None:
    """How the corpus' tasks make samples of images; None where they differ in that, or are no images.

    Where tasks are of several data sets, each with pixels of its own mean, the first one's statistics stand for all.
    """
    forms = list(dict.fromkeys(input_form(task.recipe) for task in corpus.tasks.values()))
    if not forms:
        return None
    alike = {None if form is None else (form.size, form.channels, form.encoder) for form in forms}
    return forms[0] if len(alike) == 1 else None


class _Watcher:
    """Tells the caller of new rows in the runs' metric logs while workers write them."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        on_progress: OnProgress | None,
        normalizers: NormalizerTable,
        data: DataSpec,
    ) -> None:
        self._configs = configs
        self._on_progress = on_progress
        self._seen: dict[str, int] = {config.out: len(read_metrics(config.out)) for config in configs}
        self._steps = {
            config.out: {
                stage.name: stage.config.num_steps
                for stage in build_generator(config.method, config.generator, normalizers, data, 0).stages()
            }
            for config in configs
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        if self._on_progress is not None:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._on_progress is not None:
            self._thread.join()
            self._tell()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._tell()

    def _tell(self) -> None:
        assert self._on_progress is not None
        for config in self._configs:
            rows = read_metrics(config.out)
            for row in rows[self._seen[config.out] :]:
                total = self._steps[config.out][row["stage"]]
                self._on_progress(config.out, row["stage"], row["step"] + 1, total, row)
            self._seen[config.out] = len(rows)
