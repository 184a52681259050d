"""Launches runs: checks them, locks their folders, and starts the workers that train them.

One launch may hold several runs, which the same workers train one after another: starting Ray Train workers takes 17 to
40 seconds, more than training a small generator. The same call made again goes on where the last one stopped.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from raywgen.config import ConfigError, to_yaml
from raywgen.config_places import without_places
from raywgen.corpus import Corpus
from raywgen.generators import Generator, Stage
from raywgen.generators.bundle import ENCODER, save_bundle
from raywgen.locations import absolute, joined
from raywgen.locks import only_one
from raywgen.out_folder import check_room, checked_out
from raywgen.stops import Stopped, stop_signals
from raywgen.storage import Storage
from raywgen.tasks.encoders import copy_encoder, encoder_kind
from raywgen.tasks.preprocessing import InputForm, input_form
from raywgen.tasks.sentence_form import SentenceForm, sentence_form
from raywgen.training.checkpoints import CheckpointManager, check_fits
from raywgen.training.config import TrainConfig, flatten, read_train_config
from raywgen.training.data import data_spec, has_tasks, measure_normalizers
from raywgen.training.devices import with_device
from raywgen.training.early import check_batches
from raywgen.training.export import stored_tensors
from raywgen.training.memory_check import check_memory, declared_memory
from raywgen.training.resource_check import Nodes, check_run, connected_nodes, worker_requests
from raywgen.training.resume import resumed_checkpoint
from raywgen.training.rows import data_digest
from raywgen.training.run_bytes import least_run_bytes
from raywgen.training.run_folder import BUNDLE, CONFIG, STARTS, is_done, snapshot_folder, warn
from raywgen.training.run_method import read_method
from raywgen.training.run_spec import RunSpec
from raywgen.training.run_tokens import check_tokens
from raywgen.training.runlog import Row, read_metrics
from raywgen.training.source import with_source
from raywgen.training.stages_file import StageRecord, stage_records, write_stages
from raywgen.training.workers import train_here, train_on_ray
from raywgen.trust import entry_point

OnProgress = Callable[[str, str, int, int, Row], None]
"""Called with run folder, stage, step, steps of the stage, and the newest row of the metric log."""

_POLL_SECONDS, _POLL_SECONDS_OF_STORE = 0.5, 5.0
_MOST_NAMED = 3
_SHARED = ("corpus", "num_workers", "device", "source")


@entry_point
def launch(
    configs: Sequence[TrainConfig],
    on_progress: OnProgress | None = None,
    *,
    stop_at: float = 1.0,
    init_from: str = "",
    session: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Trains generators one after another; those already trained are left as they are.

    Args:
        configs: Runs that share a corpus and workers.
        on_progress: Called with every new row of the metric logs.
        stop_at: Share of the last stage's steps after which training stops. `snapshot_folder` then holds the generator
            and a copy of the checkpoint, and the same call with a larger share goes on there.
        init_from: Folder of a checkpoint, such as another run's `snapshot_folder`, from which a run begins that has no
            checkpoint of its own.
        session: Starts Ray, where runs ask for workers; it is entered once corpus, settings and disk are checked.

    Raises:
        OutError: A run folder is empty, the current folder, in an object store that cannot be written to, or on a disk
            that has no room for its checkpoints.
        ConfigError: A run folder holds another run, or a stage has fewer networks in a batch than workers and parts.
        DoesNotFitError: A stage does not fit into the memory of the workers.
        BundleFormatError: A run folder holds a generator of another version of raywgen.
        CorpusError: The corpus cannot be read.
        DeviceError: A run without workers asks for a GPU, and this machine has none.
        ClusterError: The cluster has no room for the workers and never will.
        InUseError: Another process works on a run folder.
        TrainingError: Workers failed too often.
        Stopped: A signal came, and what could be kept is kept.
    """
    configs = [replace(config, out=checked_out(config.out, TrainConfig.out)) for config in configs]
    _check(configs)
    unfinished = [config for config in configs if not is_done(config.out)]
    if not unfinished:
        return
    placed = [with_source(config) for config in unfinished]
    corpus = Corpus.open(unfinished[0].corpus, copies=placed[0].source != "ray")
    specs = run_specs(placed, corpus, stop_at, init_from)
    generators = [_checked_generator(spec, corpus) for spec in specs]
    with ExitStack() as stack:
        if unfinished[0].max_workers:
            stack.enter_context(session())
        specs = [replace(spec, config=with_device(spec.config)) for spec in specs]
        stages = _placed_stages(specs, generators)
        del generators  # The workers build their own, and a large one takes memory where it cannot do without values.
        for config in unfinished:
            stack.enter_context(only_one(config.out))
        _check(unfinished)  # Whoever held a folder a moment ago may have begun another run there.
        inputs = common_input_form(corpus)
        for config, records in zip(unfinished, stages, strict=True):
            Storage.at(config.out).write(CONFIG, to_yaml(config).encode())
            write_stages(records, config.out)
            if inputs is not None and inputs.encoder and encoder_kind(inputs.encoder) == "folder":
                copy_encoder(inputs.encoder, joined(config.out, f"{BUNDLE}/{ENCODER}"))
        with _MetricsMonitor(unfinished, stages, on_progress):
            _train(specs, corpus)
        if stop_at < 1:
            for spec in specs:
                _save_snapshot(spec)


def run_specs(
    configs: Sequence[TrainConfig], corpus: Corpus, stop_at: float = 1.0, init_from: str = ""
) -> list[RunSpec]:
    """Describes runs on one corpus, as they travel to workers."""
    normalizers, data, inputs = (
        measure_normalizers(corpus, joined(configs[0].out, STARTS)),
        data_spec(corpus),
        common_input_form(corpus),
    )
    sentences, name = _sentence_form(corpus), uuid.uuid4().hex[:8]
    return [
        RunSpec(
            config=config,
            metadata=_metadata(config, inputs, sentences),
            normalizers=normalizers,
            data=data,
            snapshot=corpus.snapshot,
            stop_at=stop_at,
            init_from=init_from,
            launch=name,
        )
        for config in configs
    ]


def _train(specs: list[RunSpec], corpus: Corpus) -> None:
    """Trains until all runs are done, or a signal asks to stop.

    Raises:
        Stopped: A signal came; the newest checkpoint says where the same call goes on.
    """
    with stop_signals(specs[0].config.grace_seconds) as stop:
        try:
            if specs[0].config.max_workers == 0:
                train_here(specs, stop)
            else:
                digest, warned = data_digest(corpus), []

                def tell(sentence: str) -> None:
                    warn(sentence)
                    warned.append(sentence)

                for spec in specs:  # Warns here, before any worker starts, of checkpoints that workers will skip.
                    checkpoints = CheckpointManager(spec.config.out)
                    resumed_checkpoint(spec, spec.skeleton(), digest, checkpoints, tell, thorough=False)
                train_on_ray(specs, stop, warned)
            if stop.number is not None and not all(is_done(spec.config.out) for spec in specs):
                raise Stopped(stop.number)
        except Stopped as stopped:
            stopped.kept = _kept(specs)
            raise


def _save_snapshot(spec: RunSpec) -> None:
    """Copies the newest checkpoint to `snapshot_folder`, with its generator as a bundle beside it."""
    generator, folder = spec.skeleton(), snapshot_folder(spec.config.out, spec.stop_at)
    stored, _ = CheckpointManager(spec.config.out).newest(lambda found: check_fits(found.index, generator))
    assert stored is not None, f"{spec.config.out} was trained and holds no checkpoint"
    save_bundle(generator, folder, spec.metadata, stored_tensors(stored, generator))
    stored.copy_to(Storage.at(folder))


def _kept(specs: list[RunSpec]) -> str:
    for spec in specs:
        out = spec.config.out
        if not is_done(out):
            position = CheckpointManager(out).position()
            if position is None:
                return f"{out} has no checkpoint yet; the same command begins again"
            names = [*(stage.name for stage in spec.skeleton().stages()), "all"]
            where = f"step {position[1]} of stage '{names[position[0]]}'"
            return f"{out} keeps a checkpoint at {where}; the same command goes on from there"
    return "all generators are trained"


def _check(configs: Sequence[TrainConfig]) -> None:
    for config in configs:
        if different := _differences(config):
            raise ConfigError(
                f"{config.out} holds a run with another config ({joined(config.out, CONFIG)}): {'; '.join(different)}; "
                "give another `out`, or delete the folder"
            )
        first = configs[0]
        if any(getattr(config, key) != getattr(first, key) for key in _SHARED):
            raise ConfigError(f"runs of one launch must share {', '.join(f'`{key}`' for key in _SHARED)}")


def _check_room(config: TrainConfig) -> Nodes | None:
    """Refuses workers that no node could hold; returns the nodes of the cluster, None where none is needed."""
    if config.max_workers == 0:
        return None
    import ray

    if not ray.is_initialized():
        return None
    nodes = connected_nodes(worker_requests(config))
    check_run(config, nodes)
    return nodes


def _checked_generator(spec: RunSpec, corpus: Corpus) -> Generator:
    """Builds the generator of a run without values, after it has checked that the run can be trained to its end."""
    generator = spec.skeleton()
    stages = generator.stages()
    _check_blocks(stages, spec.config)
    check_room(spec.config.out, least_run_bytes(generator, spec.config, spec.stop_at))
    for stage in stages:
        check_tokens(stage.tokens, corpus)
    check_batches(spec.config)
    if spec.config.keep_best and not corpus.select(split="validation").num_rows:
        raise ConfigError(
            f"keep_best={spec.config.keep_best}: {corpus.location} holds no networks of validation tasks, by which the "
            "best checkpoints could be told; leave keep_best out"
        )
    if not has_tasks(corpus):
        _check_tasks(stages, spec.config.method, corpus.location)
    return generator


def _placed_stages(specs: Sequence[RunSpec], generators: Sequence[Generator]) -> list[list[StageRecord]]:
    """Describes the stages of runs whose devices are known, after it has checked that the cluster can train them."""
    nodes = _check_room(specs[0].config)
    for spec, generator in zip(specs, generators, strict=True):
        if nodes is not None and (memory := declared_memory(spec.config, nodes)) is not None:
            begun, _ = CheckpointManager(spec.config.out).position() or (0, 0)
            check_memory(generator.stages()[begun:], generator.layouts, spec.config, memory)
    return [stage_records(generator.stages()) for generator in generators]


def _check_blocks(stages: Sequence[Stage], config: TrainConfig) -> None:
    """Refuses to recompute or compile blocks in a stage whose inner steps `torch.func` takes, which can do neither."""
    for key in ("activation_checkpointing", "compile"):
        for stage in stages:
            if getattr(config, key) and stage.parameter_use == "functional":
                raise ConfigError(
                    f"{key}=true: stage '{stage.name}' of {config.method} takes inner steps on copies of its "
                    f"parameters, which torch.func does not do together with it; leave {key} out"
                )


def _check_tasks(stages: Sequence[Stage], method: str, corpus: str) -> None:
    """Refuses stages that need tasks, for a corpus that has none."""
    is_useful_without = any(not stage.needs.tasks for stage in stages)
    for stage in stages:
        if stage.needs.tasks:
            is_left_out = stage.is_optional and is_useful_without
            off = f"generator.{stage.name}.num_steps=0 leaves it out, or " if is_left_out else ""
            raise ConfigError(
                f"{corpus} holds weights alone, and stage '{stage.name}' of {method} needs to know what networks do "
                f"and how they are built: {off}say so by `raywgen corpus describe`"
            )


def _differences(config: TrainConfig) -> list[str]:
    """The keys in which the run of the folder is another one, as `key is ... there and ... here`."""
    path = joined(config.out, CONFIG)
    if Storage.at(config.out).size(CONFIG) is None:
        return []
    if (method := read_method(path)) != config.method:
        return [f"method is {method} there and {config.method} here"]
    there, here = _identity(read_train_config(path)), _identity(config)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return [f"{name} is {there.get(name)} there and {here.get(name)} here" for name in names[:_MOST_NAMED]]


def _identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that may not change when a run goes on.

    The place of the run and of stored tokens, its workers, and how often it saves and logs may change. The content of
    the corpus is compared by its digest.
    """
    free: dict[str, Any] = {"out": "", "num_workers": 1, "device": "auto", "source": "auto"}
    free |= {"max_failures": 0, "grace_seconds": 1.0, "worker_timeout": 1.0, "resize_seconds": 1.0}
    free |= {"room_timeout": 1.0}
    engine: dict[str, Any] = {
        "strategy": "manual",
        "accumulate": 1,
        "activation_checkpointing": False,
        "compile": False,
        "zero_stage": 0,
        "offload": "none",
    }
    kept: dict[str, Any] = {"keep_newest": 2, "keep_best": 0, "best_metric": "val_loss"}
    fixed = replace(
        config,
        **free,
        **engine,
        **kept,
        checkpoint_every=1,
        log_every=1,
        validate_every=1,
        corpus=absolute(config.corpus),
    )
    return dict(flatten(asdict(without_places(fixed))))


def _metadata(config: TrainConfig, inputs: InputForm | None, sentences: SentenceForm | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"corpus": config.corpus, "seed": config.seed, "torch": torch.__version__}
    if sentences is not None:
        metadata["sentences"] = asdict(sentences)
    return metadata if inputs is None else metadata | {"inputs": asdict(inputs)}


def _sentence_form(corpus: Corpus) -> SentenceForm | None:
    """Returns how the corpus' tasks make samples of sentences; None where they do not."""
    recipes = [task.recipe for task in corpus.tasks.values()]
    return sentence_form(recipes, [network.recipe for network in corpus.networks.values()])


def common_input_form(corpus: Corpus) -> InputForm | None:
    """Returns how the corpus' tasks make samples of images; None if they differ in that, or are no images.

    If tasks are of several data sets, each with pixels of its own mean, the first one's statistics stand for all.
    """
    forms = list(dict.fromkeys(input_form(task.recipe) for task in corpus.tasks.values()))
    if not forms:
        return None
    alike = {None if form is None else (form.size, form.channels, form.encoder) for form in forms}
    return forms[0] if len(alike) == 1 else None


class _MetricsMonitor:
    """Reports new rows of the runs' metric logs to the caller while workers write them."""

    def __init__(
        self, configs: Sequence[TrainConfig], stages: Sequence[Sequence[StageRecord]], on_progress: OnProgress | None
    ) -> None:
        self._on_progress = on_progress
        self._num_seen = {config.out: len(read_metrics(config.out)) for config in configs}
        self._num_steps = {
            config.out: {stage.name: stage.num_steps for stage in records}
            for config, records in zip(configs, stages, strict=True)
        }
        is_local = all(Storage.at(config.out).is_local for config in configs)
        self._poll_seconds = _POLL_SECONDS if is_local else _POLL_SECONDS_OF_STORE
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        if self._on_progress is not None:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._on_progress is not None:
            self._thread.join()
            self._report(self._on_progress)

    def _watch(self) -> None:
        assert self._on_progress is not None
        while not self._stop.wait(self._poll_seconds):
            with suppress(OSError):  # An object store may not answer for a while.
                self._report(self._on_progress)

    def _report(self, on_progress: OnProgress) -> None:
        for out, num_seen in list(self._num_seen.items()):
            rows = read_metrics(out)
            for row in rows[num_seen:]:
                on_progress(out, row["stage"], row["step"] + 1, self._num_steps[out][row["stage"]], row)
            self._num_seen[out] = len(rows)
