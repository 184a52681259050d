"""The settings of a training run: one generator, one corpus, one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raywgen.config import ConfigError, check_file_or_name, config_file, load_config, one_line
from raywgen.generators import METHODS, GeneratorConfig, UnknownMethodError, is_import_path, method
from raywgen.nn.devices import Device
from raywgen.nn.precision import Precision
from raywgen.stored_config import read_stored_config
from raywgen.tasks.augment import check_augment
from raywgen.training.checkpoints import Retention
from raywgen.training.engine import EngineSettings, Offload
from raywgen.trust import named_in, trusting


def _generator_config(settings: Mapping[str, Any]) -> type[GeneratorConfig]:
    """Returns the class of the settings below `generator`, which depends on the method."""
    try:
        return method(str(settings["method"])).Config
    except UnknownMethodError as error:
        raise ValueError(str(error)) from error


@dataclass(kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        method: `igpg`, `mcdi`, `lohp`, `units`, `direct` or `hypernetwork`, or `package.module:Class`, a generator of
            your own.
        generator: The method's own config; the empty base class stands for its defaults.
        corpus: Path or URI of the training corpus.
        out: Run folder: a local path, or a URI of an object store (`s3://`, `gs://`, `hdfs://`); all workers must reach
            it.
        num_workers: Ray Train workers; 0 trains in this process, without Ray workers and DeepSpeed. Of a range such as
            `[2, 8]` the run has as many as there is room for: a lost node shrinks it, a new one grows it.
        source: How batches are read: `mapped`, from memory-mapped shards (remote ones are copied to the cache of each
            node first); `ray`, by reader actors that fetch what a step sees, for corpora on an object store that no
            node shall copy; or `auto`: `ray` where shards cannot be mapped and there are workers.
        strategy: `manual`, or `auto`: for each stage `accumulate`, `zero_stage` and `offload` are chosen from its
            sizes, the workers and their memory, whatever stands there; a line says which, and why.
        accumulate: Parts in which each worker takes its share of a batch, one after another, to save memory.
        activation_checkpointing: Keeps the inputs of blocks only, and computes their activations again in the backward
            pass: about a third more work, and far less memory.
        compile: Compiles the blocks of networks; needs a C++ compiler, or Triton on a GPU, and has no effect without.
        zero_stage: 0 shards nothing; DeepSpeed ZeRO shards: 1 the optimiser's state, 2 gradients too, 3 parameters too.
        offload: Keeps the `optimizer`'s state, or `parameters` too (ZeRO-3), in the memory of the host; or `none`.
        device: `cpu`, `cuda` (one GPU per worker, or one for this process where there are no workers) or `auto`: GPUs
            where there are enough.
        precision: Precision of matrix products: `fp32`, `bf16` (parameters and moments stay float32) or `auto`: bf16
            where the processor has units for it.
        checkpoint_every: Most optimiser steps that a fault costs. Checkpoints are begun twice as often, as each is
            written beside training.
        keep_newest: Number of the newest checkpoints that are kept.
        keep_best: Number of checkpoints of each stage that are kept beside the newest: those with the lowest
            `best_metric`. The run is then validated at every checkpoint, too.
        best_metric: A metric of the validation, as the metric log names it.
        log_every: Optimiser steps between rows of the metric log.
        validate_every: Optimiser steps between validations, on tasks that are never trained on.
        grace_seconds: After Ctrl-C or SIGTERM, how long the step under way may take to end and its checkpoint to be
            written; clusters kill a process about 30 seconds after they have asked it to end.
        max_failures: Number of times that a run restarts from its last checkpoint when a worker dies or hangs; nodes
            that are taken away with notice do not count.
        worker_timeout: Seconds that a worker may not answer, or keep the others waiting, until it counts as hung.
        room_timeout: Seconds that a run waits for room for its fewest workers, such as nodes that an autoscaler adds,
            when it begins or its nodes have gone, until it ends.
        resize_seconds: Seconds between looks, while the workers of a range run well, for room for more of them.
        num_condition_samples: Labelled samples a generator is shown per network.
        num_query_samples: Further labelled samples per network, for losses on what it does.
        shot: Labelled samples of each class that a generator is shown, in place of `num_condition_samples` at random;
            none of them is among the further ones. 0 draws at random.
        augment: Changes of the further samples, if these are images, at each training step: `flip`, `shift-K` (K
            pixels), both joined by `+`, or empty for none. A generator that meets few images for many steps learns
            them by heart without.
        seed: Seed of initialisation, data order and noise.

    Examples:
        >>> config = raywgen.TrainConfig(method="mcdi", corpus="runs/zoo/corpus", out="runs/mcdi", num_workers=0)
        >>> config.generator.denoiser.num_steps
        1000
    """

    method: str = "igpg"
    generator: GeneratorConfig = field(default_factory=GeneratorConfig, metadata={"group": _generator_config})
    corpus: str = "runs/zoo/corpus"
    out: str = "runs/igpg"
    num_workers: int | list[int] = 2
    source: Literal["auto", "mapped", "ray"] = "auto"
    strategy: Literal["manual", "auto"] = "manual"
    accumulate: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    zero_stage: int = 1
    offload: Offload = "none"
    device: Device = "auto"
    precision: Precision = "fp32"
    checkpoint_every: int = 100
    keep_newest: int = 2
    keep_best: int = 0
    best_metric: str = "val_loss"
    log_every: int = 10
    validate_every: int = 50
    grace_seconds: float = 25.0
    max_failures: int = 2
    worker_timeout: float = 600.0
    room_timeout: float = 600.0
    resize_seconds: float = 60.0
    num_condition_samples: int = 64
    num_query_samples: int = 128
    shot: int = 0
    augment: str = ""
    seed: int = 0

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the room that there is."""
        return isinstance(self.num_workers, list)

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the run may have."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def engine_settings(self) -> EngineSettings:
        """Returns the settings that concern the engine."""
        return EngineSettings(
            precision=self.precision,
            accumulate=self.accumulate,
            activation_checkpointing=self.activation_checkpointing,
            compile=self.compile,
            zero_stage=self.zero_stage,
            offload=self.offload,
        )

    @property
    def save_every(self) -> int:
        """Steps between checkpoints: two within `checkpoint_every`, so that one is durable whenever a fault comes."""
        return max(1, self.checkpoint_every // 2)

    @property
    def may_shard_parameters(self) -> bool:
        """Whether ZeRO-3 is asked for, or may be chosen."""
        return self.zero_stage == 3 or self.strategy == "auto"

    def retention(self) -> Retention:
        """Returns which checkpoints are kept."""
        return Retention(newest=self.keep_newest, best=self.keep_best, metric=self.best_metric)

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage={self.zero_stage}: give 0, 1, 2 or 3")
        self._check_workers()
        self._check_offload()
        if self.compile and self.zero_stage == 3 and self.max_workers:
            raise ValueError(
                "compile=true: under zero_stage=3 every module gathers its parameters, and nothing compiles; "
                "give zero_stage=2, or compile=false"
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate}: must be at least 1")
        if min(self.checkpoint_every, self.log_every, self.validate_every) < 1:
            raise ValueError("checkpoint_every, log_every and validate_every must be at least 1")
        if min(self.num_condition_samples, self.num_query_samples) < 1:
            raise ValueError("num_condition_samples and num_query_samples must be at least 1")
        for name in ("grace_seconds", "worker_timeout", "room_timeout", "resize_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.keep_newest < 1 or self.keep_best < 0:
            raise ValueError("keep_newest must be at least 1, keep_best at least 0")
        if not self.best_metric.startswith("val_"):
            raise ValueError(f"best_metric={self.best_metric}: give a metric of the validation, such as val_loss")
        check_augment(self.augment)
        if self.shot < 0:
            raise ValueError(f"shot={self.shot}: must be at least 0")
        with trusting(*named_in(self.method)):
            schema = _generator_config({"method": self.method})
        if type(self.generator) is GeneratorConfig:
            self.generator = schema()
        if not isinstance(self.generator, schema):
            raise ValueError(f"generator: method={self.method} takes a {schema.__name__}, not {self.generator!r}")

    def _check_workers(self) -> None:
        given = self.num_workers
        if self.source == "ray" and not self.max_workers:
            raise ValueError(
                "source=ray: the readers serve Ray's workers, and num_workers=0 has none; give num_workers=1 or more, "
                "or source=mapped"
            )
        if isinstance(given, int):
            if given < 0:
                raise ValueError(f"num_workers={given}: must be at least 0")
        elif len(given) != 2 or not 1 <= given[0] <= given[1]:
            raise ValueError(
                f"num_workers={given}: give a number, or the fewest and the most, at least 1 each, such as [2, 8]"
            )

    def _check_offload(self) -> None:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if least and not self.max_workers:
            raise ValueError(f"offload={self.offload}: DeepSpeed offloads, and num_workers=0 trains without it")
        if self.zero_stage < least:
            raise ValueError(f"offload={self.offload}: needs zero_stage={least} at least, not {self.zero_stage}")


def load_train_config(
    name: str | None, overrides: Sequence[str] = (), working_dir: str | Path | None = None
) -> TrainConfig:
    """Loads the config of a run by what a user calls it.

    Args:
        name: A method such as `igpg` or `package.module:Class`, a shipped config such as `igpg/digits`, a YAML file, or
            None for the defaults.
        overrides: Dotted assignments `key=value`.
        working_dir: The folder that relative paths of files begin at; the current one by default.

    Raises:
        ConfigError: The name is none of these (the message says the nearest), or the config cannot be used.
    """
    if name is None:
        return load_config(TrainConfig, None, overrides)
    if name in METHODS or is_import_path(name):
        return load_config(TrainConfig, None, [f"method={name}", *overrides])
    if "://" in name:
        return load_config(TrainConfig, name, overrides)
    found = config_file(name, working_dir=working_dir or "")
    if found is None:
        check_file_or_name(name, METHODS)
    return load_config(TrainConfig, found or Path(working_dir or "") / name, overrides)


def read_train_config(path: str | Path) -> TrainConfig:
    """The config that a run folder holds, every value as it stands there.

    Raises:
        ConfigError: The file is missing, or holds no config of a run; the message names the remedy.
        UntrustedError: Its method is a class of a package that the user did not name.
    """
    try:
        return read_stored_config(TrainConfig, path)
    except ConfigError as error:
        reason = one_line(error)
        raise ConfigError(
            f"{path} is damaged ({reason}); delete it and train with the settings of before: the run goes on"
        ) from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
