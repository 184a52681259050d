"""Measures the ladder and novelty of whole networks that IGPG generates for a zoo of one task, by kind of start.

Zoos are split by trajectory, and no row is a best of several networks. Networks with own starts are the hard case:
their weights have no common meaning position by position, so averages, Gaussians and a plain token prior are at chance.
From a branched start even a Gaussian is nearly perfect, so a good score there proves nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from raywgen.benchmarks.recipes import SeededConfig, folder_of, over_seeds
from raywgen.benchmarks.trained import trained_zoo
from raywgen.benchmarks.zoo_ladder import Ladder, LadderConfig
from raywgen.config import SHIPPED, load_config
from raywgen.corpus import Corpus
from raywgen.corpus.align import align
from raywgen.corpus.derive import split
from raywgen.corpus.manifest import MANIFEST
from raywgen.corpus.storage import CorpusStorage
from raywgen.generation import load
from raywgen.generators import Generator
from raywgen.generators.bundle import load_bundle
from raywgen.progress import Reporter
from raywgen.tasks import build_network
from raywgen.training import TrainConfig, launch
from raywgen.training.run_folder import STAGES
from raywgen.training.session import ray_session
from raywgen.zoo import ZooConfig
from raywgen.zoo.config import Start

Recipe = Literal["tiny-mnist", "tiny-cifar10"]
# The network of colour images costs several times more, so there are fewer; their 15 epochs of 10,000 images come from
# all images, as in the published zoo.
_SIZES: dict[Recipe, list[str]] = {
    "tiny-mnist": [],
    "tiny-cifar10": [
        *("seeds_per_task=64", "tasks.limit=null"),
        *("num_steps=2340", "checkpoint_steps=[1404,1638,1872,2106,2340]"),
    ],
}
# Test accuracy in percent before any fine-tuning (IGPG, table 1; papers.md, section 1.4).
_PUBLISHED: dict[Recipe, dict[str, float]] = {
    "tiny-mnist": {"igpg": 83.2, "sane_sub": 86.7, "d2nwg": 80.52, "best": 86.7},
    "tiny-cifar10": {"igpg": 58.3, "sane_sub": 57.9, "d2nwg": 58.8, "best": 58.8},
}


@dataclass(kw_only=True)
class IGPGZooConfig(SeededConfig):
    """The zoos and the training runs.

    Attributes:
        recipe: `tiny-mnist` or `tiny-cifar10`, of `configs/zoo` and `configs/igpg`.
        data: Training images, in place of the recipe's.
        test_data: Test images, likewise.
        starts: Kinds of start: `own`, `shared`, `branched`.
        branch_steps: Steps that the networks of a branched zoo have in common.
        heldout: Share of the trajectories that are held out from training.
        align: Bring networks of own starts into one order of hidden units first. The task-loss stage needs none.
        zoo: Overrides of the zoo's recipe, such as `[seeds_per_task=20]`.
        igpg: Overrides of the shipped training run, such as `[generator.task_loss.num_steps=100]`.
        ladder: Settings of generation and of the ladder.
    """

    recipe: Recipe = "tiny-mnist"
    data: str = ""
    test_data: str = ""
    starts: list[Start] = field(default_factory=lambda: ["own", "shared", "branched"])
    branch_steps: int = 200
    heldout: float = 0.1
    align: bool = False
    zoo: list[str] = field(default_factory=list)
    igpg: list[str] = field(default_factory=list)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    out: str = "runs/benchmarks/igpg-zoo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.starts or len(set(self.starts)) < len(self.starts):
            raise ValueError(f"starts={self.starts}: give at least one, and each once")


def measure(config: IGPGZooConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains zoos and generators for every seed and start, then puts them on the ladder."""
    root = config.root()
    rows, conditions = [], {}
    for seed in config.all_seeds:
        row: dict[str, float] = {}
        for start in config.starts:
            figures, conditions[start] = _one_start(config, root, start, seed)
            row |= {f"{start}_{name}": value for name, value in figures.items()}
        rows.append(row)
    figures, spreads = over_seeds(rows)
    common = {
        "recipe": config.recipe,
        "published_epoch_0": _PUBLISHED[config.recipe],
        "best_of": 1,
        "zoo": config.zoo,
        "igpg": config.igpg,
    }
    return figures, conditions | config.conditions(spreads) | common | {"each_seed": rows}


def zoo_recipe(config: IGPGZooConfig, start: Start, seed: int) -> ZooConfig:
    """Returns the zoo's recipe for one kind of start.

    Raises:
        ValueError: Overrides ask for several architectures or tasks.
    """
    given = {"tasks.path": config.data, "tasks.test_path": config.test_data}
    data_keys = [f"{key}={value}" for key, value in given.items() if value]
    branch = [f"branch_steps={config.branch_steps}"] if start == "branched" else []
    overrides = [*_SIZES[config.recipe], *data_keys, f"start={start}", *branch, *config.zoo, f"seed={seed}"]
    zoo = load_config(ZooConfig, SHIPPED / "zoo" / f"{config.recipe}.yaml", overrides)
    num_tasks = zoo.num_seen_tasks + zoo.num_validation_tasks + zoo.num_unseen_tasks
    if (len(zoo.networks), zoo.num_seen_tasks, num_tasks) != (1, 1, 1):
        raise ValueError(
            f"zoo={config.zoo}: {len(zoo.networks)} architectures, {num_tasks} tasks; leave one seen of each"
        )
    return zoo


def _one_start(config: IGPGZooConfig, root: str, start: Start, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    with ray_session():
        corpus = _held_out(config, root, trained_zoo(root, zoo_recipe(config, start, seed)), seed)
        if start == "own" and config.align:
            corpus = _aligned(root, corpus, seed)
        generator, token_prior = _trained(config, root, corpus, seed)
    ladder = Ladder(corpus, config.ladder, seed)
    with Reporter().step("ladder", f"{start} starts") as bar:
        figures = ladder.figures(generator, token_prior, bar.named)
    return figures, ladder.conditions() | {"aligned": start == "own" and config.align}


def _held_out(config: IGPGZooConfig, root: str, zoo: Corpus, seed: int) -> Corpus:
    recipe = {"of": zoo.location, "heldout": config.heldout, "seed": seed}
    folder = folder_of(root, "split", recipe)
    return _kept(folder) or split(folder, zoo, by="trajectory_id", heldout=config.heldout, seed=seed)


def _aligned(root: str, corpus: Corpus, seed: int) -> Corpus:
    folder = folder_of(root, "aligned", {"of": corpus.location, "seed": seed})
    if (kept := _kept(folder)) is not None:
        return kept
    with Reporter().step("align", "hidden units in the order of one training network") as bar:
        return align(folder, corpus, build_network, on_match=bar.update)


def _kept(folder: str) -> Corpus | None:
    return None if CorpusStorage.at(folder).size(MANIFEST) is None else Corpus.open(folder)


def _trained(config: IGPGZooConfig, root: str, corpus: Corpus, seed: int) -> tuple[Generator, Generator]:
    """Trains IGPG and returns it after all of its stages and after its prior."""
    base = SHIPPED / "igpg" / f"{config.recipe}.yaml"
    make = partial(load_config, TrainConfig, base)
    run_settings = [f"corpus={corpus.location}", f"seed={seed}"]
    recipe = asdict(make([*config.igpg, *run_settings]))
    out = folder_of(root, "igpg", recipe)
    run = make([*config.igpg, *run_settings, f"out={out}"])
    with Reporter().step("train", "tokeniser, prior, task-loss stage") as bar:
        launch([run], bar.training)
    return load(out, device="cpu").generator.eval(), load_bundle(Path(out) / STAGES / "prior").eval()
