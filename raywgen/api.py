"""The functions of `import raywgen`: each does its command's work, by a config object or by settings as keywords.

Commands that train, generate or evaluate also draw a page. Here only `tune` does; `raywgen report` draws the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from raywgen.config import ConfigError, load_config, merge_config, shipped_config
from raywgen.progress import Reporter
from raywgen.trust import named_in, trusting

if TYPE_CHECKING:
    from raywgen.corpus import BuildConfig, Corpus
    from raywgen.evaluation.config import EvaluateConfig
    from raywgen.evaluation.results import Evaluation
    from raywgen.generation import AdaptConfig, Adapted, GenerateConfig, NetworkRow, TrainedGenerator
    from raywgen.nn.devices import Device
    from raywgen.training import TrainConfig
    from raywgen.tuning import TuneConfig, TuneResult
    from raywgen.zoo import ZooConfig

ConfigT = TypeVar("ConfigT")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^/@]+)?")


def load(path: str | Path, *, device: Device = "auto", trust: Sequence[str] = ()) -> TrainedGenerator:
    """Loads a trained generator.

    Args:
        path: Its run folder or bundle: a local path, a URI such as `s3://bucket/run`, or `owner/name` on the Hugging
            Face hub, with `@revision` if one is wanted. What looks like a local path is one where it, or the folder
            that it would lie in, exists; `hf://owner/name` is the hub's in any case.
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one. `.to(device)` of the result moves it later.
        trust: Packages and addresses that its encoders may come from, such as `("mynets",)`.

    Raises:
        BundleError: There is no generator, or it is damaged.
        DeviceError: There is no GPU, and one is asked for.
        UntrustedError: It names an encoder that is not to be trusted.

    Examples:
        >>> generator = raywgen.load("runs/mine", device="cpu")
        >>> generator
        TrainedGenerator(hypernetwork, 26,320 parameters, 2 layouts of 359 to 404 values, on cpu)
    """
    from raywgen.generation.loading import load as load_generator
    from raywgen.generators.bundle_copies import BundleError

    place = _place(path)
    try:
        return load_generator(place, device=device, trust=trust)
    except BundleError as error:
        if place == str(path):
            raise
        raise type(error)(f"there is no folder {path} here, and {error}") from error


def train(config: TrainConfig | str | Path | None = None, *, quiet: bool = False, **settings: Any) -> TrainedGenerator:
    """Trains a generator on a corpus as `raywgen train` does, and returns it; an interrupted run goes on.

    It does not measure the tokens of a generator that writes some, and draws no page. `raywgen train OUT/config.yaml`
    adds both to a run that is done.

    Args:
        config: A `TrainConfig`; or what the command takes: a method such as `mcdi` or `package.module:Class`, a shipped
            config such as `igpg/digits`, or a YAML file. By default the defaults of `TrainConfig`.
        quiet: Whether to print no progress to standard error.
        settings: Settings of `TrainConfig`, which come before those of `config`; groups are mappings.

    Raises:
        ConfigError, OutError, CorpusError, DeviceError, ClusterError: The run cannot begin; nothing was started.
        DoesNotFitError, TrainingError, InUseError, Stopped: See `raywgen.training.launcher.launch`.

    Examples:
        >>> generator = raywgen.train(
        ...     "hypernetwork",
        ...     corpus="runs/zoo/corpus",
        ...     out="runs/mine",
        ...     num_workers=0,
        ...     generator={"width": 16, "task_loss": {"num_steps": 2}},
        ...     quiet=True,
        ... )
    """
    from raywgen.training.config import TrainConfig, load_train_config
    from raywgen.training.run import run_training

    if isinstance(config, str | Path):
        config = load_train_config(str(config))
    run = _resolved(TrainConfig, config, settings)
    # The generator that was trained names the class and the encoder that the user named.
    with trusting(*named_in(run)):
        with _reporter(quiet).step("train", f"{run.method} into {run.out}") as bar:
            run_training(run, bar.training)
        return load(Path(run.out) if "://" not in run.out else run.out)


def generate(
    config: GenerateConfig | str | Path | None = None, *, quiet: bool = False, **settings: Any
) -> list[NetworkRow]:
    """Writes networks as files or a corpus as `raywgen generate` does, without its page (see `raywgen report`).

    To fill a module of your own, use `raywgen.load(...).fill(module, ...)`.

    Args:
        config: A `GenerateConfig`, or a YAML file; by default the defaults.
        quiet: Whether to print no progress to standard error.
        settings: Settings of `GenerateConfig`, which come before those of `config`.

    Returns:
        One row for each network: its file or checkpoint, task, and what is known of it.

    Raises:
        ConfigError, OutError, CorpusError, BundleError, DeviceError, ConditionError: The request cannot be met; see
            `raywgen.generation.generate.generate`.

    Examples:
        >>> rows = raywgen.generate(
        ...     generator="runs/mine", corpus="runs/zoo/corpus", tasks="unseen", limit=1, out="networks", quiet=True
        ... )
        >>> [row.network for row in rows]
        ['mlp-64-6-2', 'mlp-64-5-4-2']
    """
    from raywgen.generation import GenerateConfig
    from raywgen.generation import generate as write
    from raywgen.training.session import ray_session

    request = _resolved(GenerateConfig, _loaded(GenerateConfig, config), settings)
    with _reporter(quiet).step("generate", f"networks into {request.out}") as bar:
        return write(request, bar.update, lambda done, total: bar.amount(done, total, "values"), session=ray_session)


def adapt(config: AdaptConfig | str | Path | None = None, **settings: Any) -> Adapted:
    """Writes weights for a new task from its labelled examples, without gradients, as `raywgen adapt` does.

    To fill a module of your own, use `raywgen.load(...).adapt(module, support)`.

    Args:
        config: An `AdaptConfig`, or a YAML file; by default the defaults.
        settings: Settings of `AdaptConfig`, which come before those of `config`.

    Raises:
        BundleError, EncoderError, TaskError, ConditionError, UnknownLayoutError, OutError: See
            `raywgen.generation.adapt.adapt`.

    Examples:
        >>> adapted = raywgen.adapt(generator="runs/heads", support="new/", out="head.safetensors")  # doctest: +SKIP
        >>> adapted.path, adapted.on_examples  # doctest: +SKIP
    """
    from raywgen.generation import AdaptConfig
    from raywgen.generation import adapt as write

    return write(_resolved(AdaptConfig, _loaded(AdaptConfig, config), settings))


def evaluate(config: EvaluateConfig | str | Path | None = None, *, quiet: bool = False, **settings: Any) -> Evaluation:
    """Scores a generator beside all baselines at equal budget as `raywgen evaluate` does.

    It draws no page; `raywgen report OUT` does.

    Args:
        config: An `EvaluateConfig`, or a YAML file; by default the defaults.
        quiet: Whether to print no progress to standard error.
        settings: Settings of `EvaluateConfig`, which come before those of `config`.

    Returns:
        The content of `evaluation.json`; `figures` holds means over tasks in percent.

    Raises:
        OutError, BundleError, DeviceError, CorpusError, EvaluationError, InUseError: See
            `raywgen.evaluation.evaluate.evaluate`.

    Examples:
        >>> result = raywgen.evaluate(
        ...     generator="runs/mine",
        ...     corpus="runs/zoo/corpus",
        ...     out="runs/mine/evaluation",
        ...     num_tasks=1,
        ...     best_of=1,
        ...     gradient_steps=1,
        ...     finetune_epochs=[1],
        ...     quiet=True,
        ... )
        >>> result.figures["unseen_generated"] <= 100
        True
    """
    from raywgen.evaluation.config import EvaluateConfig
    from raywgen.evaluation.evaluate import evaluate as score

    request = _resolved(EvaluateConfig, _loaded(EvaluateConfig, config), settings)
    with _reporter(quiet).step("evaluate", request.generator) as bar:
        return score(request, bar.named)


def tune(config: TuneConfig | str | Path | None = None, *, quiet: bool = False, **settings: Any) -> TuneResult:
    """Searches over settings of a whole pipeline on Ray as `raywgen tune` does; an interrupted search goes on.

    Args:
        config: A `TuneConfig`, a shipped search (`igpg`, `mcdi`, `lohp`), or a YAML file; by default the defaults.
        quiet: Whether to print no progress to standard error.
        settings: Settings of `TuneConfig`, which come before those of `config`.

    Raises:
        OutError, ConfigError, CorpusError, TuneError, InUseError: See `raywgen.tuning.driver.tune`.

    Examples:
        >>> found = raywgen.tune("mcdi", num_trials=8, out="runs/tune/mcdi")  # doctest: +SKIP
        >>> found.best.knobs  # doctest: +SKIP
    """
    from raywgen.tuning import TuneConfig
    from raywgen.tuning import tune as search

    if isinstance(config, str):
        config = shipped_config("tune", config)
    return search(_resolved(TuneConfig, _loaded(TuneConfig, config), settings), _reporter(quiet))


def build_corpus(
    sources: str | Path | Sequence[str | Path] = (),
    out: str | Path = "",
    *,
    config: BuildConfig | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Corpus:
    """Ingests checkpoints of any kind into a corpus as `raywgen corpus build` does; an interrupted ingest goes on.

    Args:
        sources: Folders, files, globs, model folders, zoos of runs, or hub names.
        out: Path or URI of the corpus.
        config: A `BuildConfig`; by default the defaults.
        quiet: Whether to print no progress to standard error.
        settings: Further settings of `BuildConfig`, which come before those of `config`, such as `facts="facts.csv"`;
            `distributed=False` works in this process, without Ray.

    Raises:
        OutError, CorpusError, InUseError: See `raywgen.corpus.build.build_corpus`.

    Examples:
        >>> corpus = raywgen.build_corpus("networks", "runs/mine-again", distributed=False, quiet=True)
        >>> len(corpus), corpus[0].facts["checkpoint_id"]
        (2, 'mlp-64-5-4-2_digits_0-2-3-5-9')
    """
    from raywgen.corpus.build import BuildConfig
    from raywgen.corpus.build import build_corpus as ingest
    from raywgen.training.session import ray_session

    if sources:
        settings["sources"] = [str(one) for one in ([sources] if isinstance(sources, str | Path) else sources)]
    if str(out):
        settings["out"] = str(out)
    request = _resolved(BuildConfig, config, settings)
    with _reporter(quiet).step("corpus", f"ingest into {request.out}") as bar:
        return ingest(
            request, lambda done, total, what: bar.amount(done, total, "bytes", what), bar.say, session=ray_session
        )


def train_zoo(config: ZooConfig | str | Path | None = None, *, quiet: bool = False, **settings: Any) -> Corpus:
    """Trains many small networks on real tasks, straight into a corpus, as `raywgen zoo train` does.

    Args:
        config: A `ZooConfig`, a shipped recipe such as `digits`, or a YAML file; by default the defaults.
        quiet: Whether to print no progress to standard error.
        settings: Settings of `ZooConfig`, which come before those of `config`.

    Raises:
        OutError, ConfigError, TaskError, InUseError: See `raywgen.zoo.train.train_zoo`.

    Examples:
        >>> corpus = raywgen.train_zoo("digits", num_seen_tasks=8, out="runs/zoo/mine")  # doctest: +SKIP
    """
    from raywgen.training.session import ray_session
    from raywgen.zoo import ZooConfig
    from raywgen.zoo import train_zoo as run

    if isinstance(config, str):
        config = shipped_config("zoo", config)
    zoo = _resolved(ZooConfig, _loaded(ZooConfig, config), settings)
    with _reporter(quiet).step("zoo", f"train networks into {zoo.out}") as bar:
        return run(zoo, zoo.out, bar.update, bar.say, session=ray_session)


def _resolved(schema: type[ConfigT], config: ConfigT | None, settings: Mapping[str, Any]) -> ConfigT:
    """Returns a config with settings over its own, each checked as on the command line."""
    if config is not None and not isinstance(config, schema):
        raise ConfigError(f"config is a {type(config).__name__}; give a {schema.__name__}, or a name or path as text")
    if not settings and config is not None:
        return config
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    with trusting(*named_in(plain)):
        return merge_config(schema, [("the arguments", plain)], config)


def _loaded(schema: type[ConfigT], config: ConfigT | str | Path | None) -> ConfigT | None:
    return load_config(schema, config) if isinstance(config, str | Path) else config


def _reporter(quiet: bool) -> Reporter:
    return Reporter(Console(stderr=True, emoji=False, quiet=True) if quiet else None)


def _place(path: str | Path) -> str:
    """Returns the location of a generator: the hub's where a text is a name there, and no path on this machine."""
    text = str(path)
    is_name = isinstance(path, str) and _HUB_NAME.fullmatch(text) is not None
    return f"hf://{text}" if is_name and not Path(text).exists() and not Path(text).parent.exists() else text
