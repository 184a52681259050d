"""Networks for tasks of a corpus, for a task of the user's own, or for none, as `.safetensors` or a corpus."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from raywgen.config import save_config
from raywgen.corpus import Corpus, TaskFacts
from raywgen.corpus.storage import absolute
from raywgen.corpus.writing import writing
from raywgen.generation.actors import write_over_ray
from raywgen.generation.best import sampling_options
from raywgen.generation.fill import TrainedGenerator
from raywgen.generation.judge import ChanceWarning, remedies
from raywgen.generation.loading import bundle_folder, load
from raywgen.generation.plan import Block, BlockWriter, Job, Written, plan_blocks, threads
from raywgen.generation.request import NO_TASK, Asked, ask
from raywgen.generation.sinks import CorpusKeeper, FileKeeper, Keeper, rows_of
from raywgen.generators.bundle import bundle_digest
from raywgen.generators.igpg import SamplingConfig
from raywgen.names import one_of
from raywgen.stops import keeping
from raywgen.tasks.standing import DOUBTFUL
from raywgen.trust import entry_point, trusted

CONFIG = "config.yaml"
WHERE = ("here", "ray")
INTO = ("files", "corpus")


@dataclass(kw_only=True)
class GenerateConfig:
    """Which networks to write.

    Attributes:
        generator: Run folder or bundle.
        corpus: Names tasks and architectures.
        tasks: A task id, or a split: `seen`, `validation`, `unseen`. Of a corpus of weights alone there are none: the
            generator is told each network's name, and nothing is judged.
        network: Architecture by name, as `raywgen corpus info` lists them; empty for all.
        networks: Architectures of your own in their place, each the widths of a ReLU perceptron, a registry name, or a
            mapping with `name` (of the registry or `package.module:Class`) and arguments. One that the generator was
            never trained on is filled all the same, with a warning; it is run once on the samples first.
        instruction: A task of your own in words, in place of `tasks`; needs `data`.
        data: Its labelled samples: an `.npz` file with arrays `x` (samples first) and `y`, a Parquet file of labelled
            images or with columns of numbers and `y`, or a folder of class folders with images.
        out: Folder for the `.safetensors` files; with `into=corpus` the corpus, a path or URI.
        into: `files`, or `corpus`: Arrow shards with the facts of each network.
        num: Networks kept for each task and architecture.
        best_of: Candidates of each; the lowest loss on the labelled samples wins. By default 8, or 1 where there is
            nothing to try networks on.
        temperature: 0 writes the same network every time.
        limit: Most tasks to write for.
        seed: Of the noise.
        where: `here`, in this process, or `ray`, over actors. Networks are the same to the last bit
            on processors of one kind.
        block: Candidates written and scored at once; bounds the memory. Fewer are, of an architecture of millions.
        threads: Of a process that writes, and CPUs of an actor. More are worth it for large networks, and round
            differently.
        num_actors: Of `ray`; 0 for one for each free core.
        start_timeout: Seconds to wait for a first actor where the cluster is full.
        num_unlabelled: Training samples of each task from which statistics of batch normalisation are estimated anew,
            for every candidate before the choice; 0 leaves them as they were written.
        sampling: How tokens are drawn, of a generator that writes tokens.
    """

    generator: str = "runs/igpg"
    corpus: str = "runs/zoo/corpus"
    tasks: str = "unseen"
    network: str = ""
    networks: list[Any] = field(default_factory=list)
    instruction: str = ""
    data: str = ""
    out: str = "runs/igpg/networks"
    into: str = "files"
    num: int = 1
    best_of: int | None = None
    temperature: float = 0.5
    limit: int = 24
    seed: int = 0
    where: str = "here"
    block: int = 256
    threads: int = 1
    num_actors: int = 0
    start_timeout: float = 120.0
    num_unlabelled: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if min(1 if self.best_of is None else self.best_of, self.limit) < 1 or self.temperature < 0:
            raise ValueError("best_of and limit must be at least 1, temperature at least 0")
        if min(self.num, self.block, self.threads) < 1 or self.num_actors < 0 or self.start_timeout <= 0:
            raise ValueError(
                f"num={self.num}, block={self.block} and threads={self.threads} must be at least 1, "
                f"num_actors={self.num_actors} at least 0, start_timeout={self.start_timeout} above 0"
            )
        if self.num_unlabelled < 0 or self.num_unlabelled == 1:
            raise ValueError(
                f"num_unlabelled={self.num_unlabelled}: statistics need at least 2 samples; 0 estimates none"
            )
        if self.num > 1 and self.temperature == 0:
            raise ValueError(f"num={self.num} at temperature=0: all would be one; give a temperature above 0, or num=1")
        if self.into == "files" and "://" in self.out:
            raise ValueError(f"out={self.out}: files go to a local folder; give one, or into=corpus")
        for name, known in (("where", WHERE), ("into", INTO)):
            if getattr(self, name) not in known:
                raise ValueError(one_of(name, getattr(self, name), known))
        if bool(self.instruction) != bool(self.data):
            raise ValueError("instruction and data belong together: give both, or neither")
        if self.network and self.networks:
            raise ValueError("network names one of the corpus, networks are your own: give one of them")


@entry_point
def generate(config: GenerateConfig, on_progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """Writes `num` networks for each task and architecture, as files or as a corpus; interrupted, it goes on.

    Files have `networks.json` and the whole config beside them; those of an earlier run that ended are written anew. A
    corpus of the same settings that is there already is reused.

    Args:
        config: Which, where and how.
        on_progress: Called with networks kept so far and their number.

    Returns:
        One row per network: path or checkpoint id, task (`""` for none), network, which draw of these it is,
        log-probability; where it was tried loss and accuracy on the examples, chance, the share of the most frequent
        class and what can be said against chance; and test accuracy where the task has a test.

    Raises:
        ConfigError: No such task or architecture, or nothing is known of them that a setting needs.
        ConditionError: Instruction or data do not fit the generator.
        TaskError: An architecture of `networks` cannot be built.
        SamplingError, GuidanceError, MismatchError: The generator or the tasks do not fit `sampling`.
        BundleError, CorpusError, WeightsError: A file cannot be read or written.
        UnfinishedError: `out` holds part of a run with other settings.
        InUseError: Another process works on `out`.
        NoResourcesError, ActorsLostError: Ray has no room, or actors die again and again.

    Warns:
        UnknownLayoutWarning: The generator was never trained on an architecture of `networks`.
        ChanceWarning: Networks answer their labelled samples no better than chance.
    """
    # A task and an architecture of the user's own need no corpus.
    corpus = None if config.instruction and config.networks else Corpus.open(config.corpus)
    trained = load(config.generator)
    if corpus is not None:
        corpus.arrange(trained.generator.layouts)
    sampling_options(trained.generator, config.sampling)
    asked = ask(config, corpus, trained)
    job = _job(config, asked, corpus)
    recipe = _recipe(config, job)
    kept = keeping(f"{config.out} keeps the networks that are written; the same command goes on with the others")
    with kept, writing(config.out):
        keeper = FileKeeper(config.out, job, recipe)
        if config.into == "corpus":
            told = asked.tasks or ([] if job.names == [NO_TASK] else [_own_task(job)])
            keeper = CorpusKeeper(config.out, job, recipe, told, f"raywgen generate by {config.generator}")
            if (existing := keeper.existing()) is not None:
                rows = rows_of(existing)
                _warn_of_chance(job, rows, trained)
                return rows
        rows = _keep_all(config, job, keeper, trained, on_progress)
        if config.into == "files":
            save_config(config, Path(config.out) / CONFIG)
    _warn_of_unknown(job, rows, trained)
    _warn_of_chance(job, rows, trained)
    return rows


def _job(config: GenerateConfig, asked: Asked, corpus: Corpus | None) -> Job:
    return Job(
        generator=absolute(config.generator),
        networks=asked.networks,
        names=asked.names,
        condition=asked.condition,
        recipes=[task.recipe for task in asked.tasks],
        num=config.num,
        best_of=asked.best_of,
        temperature=config.temperature,
        seed=config.seed,
        sampling=config.sampling,
        threads=config.threads,
        num_unlabelled=config.num_unlabelled,
        is_tried=asked.is_tried,
        trust=trusted(),
        kept={
            network.layout.id: corpus.kept_tensors(network.layout.id)
            for network in asked.networks
            if corpus is not None and not network.recipe
        },
    )


def _recipe(config: GenerateConfig, job: Job) -> dict[str, Any]:
    """All that decides the networks and how they are kept; not who writes them, nor where to."""
    asked = hashlib.sha256(json.dumps([job.names, job.recipes, job.condition.instructions]).encode())
    for tensor in (job.condition.samples_BSF, job.condition.labels_BS):
        asked.update(tensor.contiguous().numpy().data)
    decisive = {
        "generator": bundle_digest(bundle_folder(config.generator)),
        "networks": [[network.name, network.layout.id, network.recipe] for network in job.networks],
        "tasks": asked.hexdigest()[:32],
        "sampling": dataclasses.asdict(job.sampling),
        "best_of": job.best_of,
    }
    names = ("into", "num", "temperature", "seed", "block", "threads", "num_unlabelled")
    return json.loads(json.dumps(decisive | {name: getattr(config, name) for name in names}))


def _own_task(job: Job) -> TaskFacts:
    return TaskFacts(
        task_id=job.names[0],
        instruction=job.condition.instructions[0],
        split="seen",
        recipe={},
        samples_SF=job.condition.samples_BSF[0],
        labels_S=job.condition.labels_BS[0],
    )


def _keep_all(
    config: GenerateConfig,
    job: Job,
    keeper: Keeper,
    trained: TrainedGenerator,
    on_progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Writes the blocks that are left and keeps each as it comes."""
    blocks = plan_blocks(job, config.block)
    left = keeper.left(blocks)
    total = sum(block.stop - block.start for block in blocks)
    done = total - sum(block.stop - block.start for block in left)
    if on_progress is not None:
        on_progress(done, total)
    for written in _written(config, left, job, trained):
        keeper.keep(written)
        done += len(written.rows)
        if on_progress is not None:
            on_progress(done, total)
    return keeper.finish(blocks, dataclasses.asdict(config))


def _written(config: GenerateConfig, blocks: list[Block], job: Job, trained: TrainedGenerator) -> Iterator[Written]:
    if not blocks:
        return
    if config.where == "ray":
        yield from write_over_ray(blocks, job, config.num_actors, config.start_timeout)
        return
    with threads(job.threads):
        writer = BlockWriter(job, trained)
        for block in blocks:
            yield writer.write(block)


def _warn_of_unknown(job: Job, rows: list[dict[str, Any]], trained: TrainedGenerator) -> None:
    for network in job.networks:
        row = next((row for row in rows if row["network"] == network.name), None)
        if row is not None and not row["known"]:
            trained.warn(network.layout)


def _warn_of_chance(job: Job, rows: list[dict[str, Any]], trained: TrainedGenerator) -> None:
    for network in job.networks:
        tried = [row for row in rows if row["network"] == network.name and "against_chance" in row]
        doubtful = [row for row in tried if row["against_chance"] in DOUBTFUL]
        if not doubtful:
            continue
        accuracy, chance = (fmean(row[name] for row in doubtful) for name in ("example_accuracy", "chance"))
        remedy = remedies(trained.generator, job.best_of, is_known=doubtful[0]["known"])
        warnings.warn(
            f"{network.name}: {len(doubtful)} of {len(tried)} networks answer the labelled samples no better than "
            f"chance (accuracy {accuracy:.2f}, chance {chance:.2f}, means over them); for better ones {remedy}",
            ChanceWarning,
            stacklevel=3,
        )
