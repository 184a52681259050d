"""Launches runs: in this process, or on Ray Train workers with DeepSpeed.

One launch may hold several runs, one after another on the same workers: starting workers costs more than
training a small generator. The same call made again goes on where the last one stopped.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raywgen.config import ConfigError, save_config, to_yaml
from raywgen.corpus import Corpus
from raywgen.corpus.storage import absolute
from raywgen.generators import DataSpec, Stage
from raywgen.generators.bundle import ENCODER, build_generator
from raywgen.locks import only_one
from raywgen.tasks.encoders import copy_encoder, encoder_kind
from raywgen.tasks.inputs import InputForm, input_form
from raywgen.training.capacity import check_run, connected_nodes, worker_bundles
from raywgen.training.config import TrainConfig, read_train_config
from raywgen.training.data import BatchOrder, LayoutRows, collect_rows, data_spec, knows_tasks, measure_references
from raywgen.training.engine import DeepSpeedEngine, Engine, LocalEngine
from raywgen.training.loop import BUNDLE, Checkpoints, LocalCheckpoints, Progress, Run, train_run
from raywgen.training.runlog import read_metrics
from raywgen.trust import entry_point, trusted, trusting
from raywgen.weights import ReferenceTable

OnProgress = Callable[[str, str, int, int, dict[str, Any]], None]
"""Called with run folder, stage, step, steps of the stage, and the newest row of the metric log."""


class TrainingError(RuntimeError):
    """Workers failed more often than `max_failures` allows; the message holds the first one's reason."""


CONFIG = "config.yaml"
_RAY = "ray_train"
_LOCAL = "checkpoint"
_POLL_SECONDS = 0.5
_VALIDATION_SEED = 5


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
    """
    _check(configs)
    left = [config for config in configs if not _is_done(config)]
    if not left:
        return
    _refuse_misfit(left[0])
    corpus = Corpus.open(left[0].corpus)
    references, data = measure_references(corpus), data_spec(corpus)
    if not knows_tasks(corpus):
        _refuse_tasks(left, corpus, references, data)
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
        with _Watcher(left, on_progress, references, data):
            if left[0].num_workers == 0:
                _train_here(left, facts, corpus, references, data, until, start)
            else:
                _train_on_ray(left, facts, corpus, references, data, until, start)


def _check(configs: Sequence[TrainConfig]) -> None:
    for config in configs:
        kept = Path(config.out) / CONFIG
        if kept.is_file() and _identity(read_train_config(kept)) != _identity(config):
            raise ConfigError(
                f"{config.out} holds a run with another config ({kept}); give another `out`, or delete the folder"
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


def _refuse_tasks(configs: Sequence[TrainConfig], corpus: Corpus, references: ReferenceTable, data: DataSpec) -> None:
    """Before anything is trained that could not be trained to the end."""
    for config in configs:
        for stage in build_generator(config.method, config.generator, references, data, config.seed).stages():
            if stage.needs_tasks:
                off = f"generator.{stage.name}.num_steps=0 leaves it out, or " if stage.name == "functional" else ""
                raise ConfigError(
                    f"{corpus.location} holds weights alone, and stage '{stage.name}' of {config.method} needs to know "
                    f"what networks do and how they are built: {off}say so by `raywgen corpus describe`"
                )


def _identity(config: TrainConfig) -> str:
    """What may not change when a run goes on: all but where and how often, as checkpoints fit any workers."""
    where = {"num_workers": 1, "zero_stage": 0, "use_gpu": False, "max_failures": 0}
    return to_yaml(replace(config, **where, checkpoint_every=1, log_every=1, validate_every=1))


def _is_done(config: TrainConfig) -> bool:
    return (Path(config.out) / BUNDLE / "generator.json").is_file()


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


def _orders(
    config: TrainConfig, num_targets: int, train: list[LayoutRows], held: list[LayoutRows], rank: int, num_workers: int
) -> tuple[BatchOrder, BatchOrder | None]:
    make = partial(
        BatchOrder,
        num_condition_samples=config.num_condition_samples,
        num_query_samples=config.num_query_samples,
        shot=config.shot,
        num_targets=num_targets,
        rank=rank,
        num_workers=num_workers,
    )
    return make(train, seed=config.seed), make(held, seed=config.seed + _VALIDATION_SEED) if held else None


def _train_here(
    configs: Sequence[TrainConfig],
    facts: Sequence[dict[str, Any]],
    corpus: Corpus,
    references: ReferenceTable,
    data: DataSpec,
    until: float,
    start: str,
) -> None:
    train = collect_rows(corpus.blocks(["train"]), corpus)
    has_validation = corpus.select(split="validation").num_rows > 0
    held = collect_rows(corpus.blocks(["validation"]), corpus) if has_validation else []
    for config, told in zip(configs, facts, strict=True):
        build = partial(build_generator, config.method, config.generator, references, data, config.seed)
        order, validation = _orders(config, build().num_targets, train, held, rank=0, num_workers=1)
        checkpoints = LocalCheckpoints(Path(config.out) / _LOCAL)
        run = Run(
            index=0,
            config=config,
            build=build,
            order=order,
            validation=validation,
            engine=partial(LocalEngine, precision=config.precision),
            checkpoints=checkpoints,
            rank=0,
            facts=told,
            until=until,
        )
        train_run(run, checkpoints.load(start))


def _train_on_ray(
    configs: Sequence[TrainConfig],
    facts: Sequence[dict[str, Any]],
    corpus: Corpus,
    references: ReferenceTable,
    data: DataSpec,
    until: float,
    start: str,
) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    first = configs[0]
    has_validation = corpus.select(split="validation").num_rows > 0
    streams = {"train": corpus.dataset(["train"])}
    if has_validation:
        streams["validation"] = corpus.dataset(["validation"])
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={
            "configs": [_placed(config) for config in configs],
            "facts": list(facts),
            "references": references,
            "data": data,
            "until": until,
            "start": absolute(start) if start else "",
            "trust": trusted(),
            "snapshot": corpus.snapshot,
        },
        torch_config=TorchConfig(backend="nccl" if first.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=first.num_workers, use_gpu=first.use_gpu),
        run_config=ray.train.RunConfig(
            name=_RAY,
            storage_path=absolute(first.out),
            failure_config=ray.train.FailureConfig(max_failures=first.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        datasets=dict(streams),
        # Every worker sees all blocks and takes its part of each global batch.
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        first_failure = next(iter(error.worker_failures.values()), error)
        reason = str(first_failure).strip().splitlines()[-1]
        raise TrainingError(
            f"{first.out}: training stopped: {reason}; logs are under {first.out}/{_RAY} and in Ray's session folder, "
            "the same command goes on from the last checkpoint"
        ) from error


def _placed(config: TrainConfig) -> TrainConfig:
    """With paths that mean the same in a worker, which Ray Train starts in a folder of its own."""
    return replace(config, corpus=absolute(config.corpus), out=absolute(config.out))


class _RayCheckpoints:
    """Reports progress to Ray Train, which keeps it in the run folder."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def save(self, progress: Progress) -> None:
        """Every worker reports; the first one's carries the checkpoint."""
        import ray.train

        position = {"run": progress.run, "stage": progress.stage, "step": progress.step}
        if self._rank > 0:
            ray.train.report(position)
            return
        with tempfile.TemporaryDirectory() as folder:
            progress.save(folder)
            ray.train.report(position, checkpoint=ray.train.Checkpoint.from_directory(folder))


def worker_loop(payload: dict[str, Any]) -> None:
    """What runs on every Ray Train worker; importable, so that it is not pickled by value."""
    with trusting(*payload["trust"]):
        _train_worker(payload)


def _train_worker(payload: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    configs: list[TrainConfig] = payload["configs"]
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    corpus = Corpus.open(configs[0].corpus, payload["snapshot"])
    train = collect_rows(_blocks("train"), corpus)
    held = collect_rows(_blocks("validation"), corpus) if corpus.select(split="validation").num_rows else []
    progress = Progress.load(payload["start"]) if payload["start"] else Progress()
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            progress = Progress.load(folder)
    for index, config in enumerate(configs):
        if index < progress.run:
            continue
        build = partial(
            build_generator, config.method, config.generator, payload["references"], payload["data"], config.seed
        )
        order, validation = _orders(config, build().num_targets, train, held, rank, num_workers)
        checkpoints: Checkpoints = _RayCheckpoints(rank)
        run = Run(
            index=index,
            config=config,
            build=build,
            order=order,
            validation=validation,
            engine=partial(
                _deepspeed, zero_stage=config.zero_stage, num_workers=num_workers, precision=config.precision
            ),
            checkpoints=checkpoints,
            rank=rank,
            facts=payload["facts"][index],
            until=payload["until"],
        )
        train_run(run, progress if index == progress.run else Progress())


def _deepspeed(stage: Stage, zero_stage: int, num_workers: int, precision: str) -> Engine:
    return DeepSpeedEngine(stage, zero_stage, num_workers, precision)


def _blocks(name: str) -> Iterator[Any]:
    import ray.train

    shard: Any = ray.train.get_dataset_shard(name)
    return iter(shard.iter_batches(batch_size=None, batch_format="pyarrow"))


class _Watcher:
    """Tells the caller of new rows in the runs' metric logs while workers write them."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        on_progress: OnProgress | None,
        references: ReferenceTable,
        data: DataSpec,
    ) -> None:
        self._configs = configs
        self._on_progress = on_progress
        self._seen: dict[str, int] = {config.out: len(read_metrics(config.out)) for config in configs}
        self._steps = {
            config.out: {
                stage.name: stage.config.num_steps
                for stage in build_generator(config.method, config.generator, references, data, 0).stages()
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
