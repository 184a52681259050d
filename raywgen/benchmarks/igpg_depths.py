"""Trains IGPG on CIFAR-style ResNets of several depths and has it generate a depth between them and one beyond.

With `varied=width` the networks differ in width instead.

All networks solve one task, each from a start of its own. A network of an unseen depth is compared with networks of
that depth that were trained as the zoo's were, with stored ones of the neighbouring depths whose blocks (or channels)
are repeated or left out, with those of a hypernetwork and of a generator of units, both trained by the task's loss
alone, and with fresh ones. The generator of units needs no trained networks: it is trained on starts of more sizes than
the zoo has, none of them one that is judged as unseen. Every figure is the mean over the same number of choices among
equally many candidates, made by the loss on the labelled samples of the condition. Statistics of batch normalisation
are estimated anew from unlabelled training samples for all but trained networks; networks with the statistics that were
written are a row of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from raywgen.benchmarks.recipes import SeededConfig, folder_of, over_seeds
from raywgen.benchmarks.size_ladder import SizeLadder, StoredSize, Varied, of_size, size_of, stored_networks
from raywgen.benchmarks.trained import trained_zoo
from raywgen.config import SHIPPED, load_config
from raywgen.corpus import Corpus
from raywgen.corpus.merge import merge
from raywgen.generation import load
from raywgen.generators import GenerationRequest, Generator, OptimizerConfig, StageConfig
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.generators.igpg import IGPG, SamplingConfig
from raywgen.generators.units import UnitsConfig
from raywgen.progress import Reporter
from raywgen.storage import Storage
from raywgen.tasks import build_task
from raywgen.training import TrainConfig, launch
from raywgen.training.run_folder import STAGES
from raywgen.training.session import ray_session
from raywgen.weights import normalizer_of_similar
from raywgen.zoo import ZooConfig

# Only the last checkpoints, whose training is nearly finished.
_ZOO = ["checkpoint_steps=[300,400]"]
# Test accuracy in percent on CIFAR-10 of an unseen depth, generated after training on 125 networks of 26 to 50 layers
# (IGPG, figure 3; papers.md, section 1.4).
_PUBLISHED = {"resnet-110 on CIFAR-10": 46.0}
# A seen size, one between those of the zoo, one beyond: depths, or channels of the first stage.
_SIZES: dict[Varied, tuple[int, int, int]] = {"depth": (26, 20, 44), "width": (12, 8, 20)}
# Sizes of the starts that the generator of units is trained on.
_STARTS: dict[Varied, list[int]] = {
    "depth": [8, 14, 26, 32, 38],
    "width": list(range(3, 19)),
}


@dataclass(kw_only=True)
class IGPGDepthsConfig(SeededConfig):
    """The depths, and the training runs of the zoo and the generators.

    Attributes:
        data: Training images, in place of scikit-learn's digits.
        test_data: Test images; by default a fifth of the training images is held out.
        varied: In what the zoo's networks differ: `depth`, or `width`, the channels of the first of three stages.
        seen: A depth (or width) of the zoo; 0 for 26 (12).
        between: One between those of the zoo; 0 for 20 (8).
        beyond: One above them; 0 for 44 (20).
        best_of: Candidates of each choice.
        num_chosen: Number of choices; figures are means over them.
        num_unlabelled: Training samples from which statistics of batch normalisation are estimated anew.
        finetune_rates: Learning rates of one epoch of fine-tuning; each start gets the best on held-out samples.
        hypernetwork: Training of the hypernetwork, with the same conditions as IGPG's.
        units: Training of the generator that writes unit by unit, likewise.
        starts: Depths (or widths) of the untrained networks that it is trained on; by default 8, 14, 26, 32 and 38
            (3 to 18), but those that are to be unseen.
        igpg_starts: Depths (or widths) of untrained networks that IGPG and the hypernetwork are trained on beside the
            zoo; none by default.
        zoo: Overrides of the zoo's recipe, such as `[seeds_per_task=8]`.
        igpg: Overrides of the shipped training run, such as `[generator.task_loss.num_steps=100]`.
    """

    data: str = ""
    test_data: str = ""
    varied: Varied = "depth"
    seen: int = 0
    between: int = 0
    beyond: int = 0
    best_of: int = 2
    num_chosen: int = 2
    num_unlabelled: int = 512
    finetune_rates: list[float] = field(default_factory=lambda: [0.01, 0.05])
    hypernetwork: HypernetworkConfig = field(
        default_factory=lambda: HypernetworkConfig(
            statistics="batch",
            task_loss=StageConfig(num_steps=1000, batch_size=2, optimizer=OptimizerConfig(learning_rate=3e-3)),
        )
    )
    units: UnitsConfig = field(
        default_factory=lambda: UnitsConfig(
            statistics="batch",
            task_loss=StageConfig(
                num_steps=2500, batch_size=2, optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100)
            ),
        )
    )
    starts: list[int] = field(default_factory=list)
    igpg_starts: list[int] = field(default_factory=list)
    zoo: list[str] = field(default_factory=list)
    igpg: list[str] = field(default_factory=list)
    out: str = "runs/benchmarks/igpg-depths"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("best_of", "num_chosen", "num_unlabelled"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        given = (self.seen, self.between, self.beyond)
        self.seen, self.between, self.beyond = (
            size or default for size, default in zip(given, _SIZES[self.varied], strict=True)
        )
        unseen = {self.between, self.beyond}
        self.starts = self.starts or [size for size in _STARTS[self.varied] if size not in unseen]
        sizes = [size_of(network, self.varied) for network in zoo_recipe(self, self.seed).networks]
        if self.seen not in sizes or unseen & set(sizes):
            raise ValueError(f"seen={self.seen}, between={self.between}, beyond={self.beyond}: the zoo's are {sizes}")
        for name in ("starts", "igpg_starts"):
            if known := unseen & set(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: {min(known)} is to be unseen; leave it out")
        if twice := set(self.igpg_starts) & set(sizes):
            raise ValueError(f"igpg_starts={self.igpg_starts}: the zoo has {min(twice)}; leave it out")
        if not min(sizes) < self.between < max(sizes) < self.beyond:
            raise ValueError(
                f"between={self.between}, beyond={self.beyond}: must lie between and above the zoo's {sizes}"
            )


def zoo_recipe(config: IGPGDepthsConfig, seed: int) -> ZooConfig:
    """Returns the zoo's recipe for the seen sizes."""
    given = {"tasks.path": config.data, "tasks.test_path": config.test_data}
    data_keys = [f"{key}={value}" for key, value in given.items() if value]
    overrides = [*_ZOO, *data_keys, *config.zoo, f"seed={seed}"]
    return load_config(ZooConfig, SHIPPED / "zoo" / f"resnet-{config.varied}s.yaml", overrides)


def starts_recipe(config: IGPGDepthsConfig, zoo: ZooConfig, sizes: Sequence[int], num: int = 1) -> ZooConfig:
    """Returns the recipe of untrained networks of some sizes, `num` of each, from which generators learn sizes."""
    networks = [of_size(zoo.networks[0], config.varied, size) for size in sizes]
    return replace(zoo, networks=networks, seeds_per_task=num, num_steps=1, checkpoint_steps=[0])


def measure(config: IGPGDepthsConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains zoos and generator for every seed, then judges what is written at each depth."""
    root = config.root()
    rows, conditions = [], {}
    for seed in config.all_seeds:
        figures, conditions = _one_seed(config, root, seed)
        rows.append(figures)
    figures, spreads = over_seeds(rows)
    conditions |= {
        "published": _PUBLISHED,
        "varied": config.varied,
        "sizes": {"seen": config.seen, "between": config.between, "beyond": config.beyond},
        "best_of": config.best_of,
        "choices": config.num_chosen,
        "statistics": f"estimated anew on {config.num_unlabelled} unlabelled training samples, but of trained networks",
        "zoo": config.zoo,
        "igpg": config.igpg,
        "starts": config.starts,
        "igpg_starts": config.igpg_starts,
        "each_seed": rows,
    }
    return figures, config.conditions(spreads) | conditions


def _one_seed(config: IGPGDepthsConfig, root: str, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    zoo, varied = zoo_recipe(config, seed), config.varied
    unseen = [of_size(zoo.networks[0], varied, size) for size in (config.between, config.beyond)]
    with ray_session():
        corpus = trained_zoo(root, zoo)
        stored = stored_networks(corpus, varied)
        originals = stored | stored_networks(trained_zoo(root, replace(zoo, networks=unseen)), varied)
        starts = trained_zoo(root, starts_recipe(config, zoo, config.starts))
        run, others = _trained(config, root, _with_starts(config, root, zoo, corpus), starts, seed)
    (facts,) = corpus.tasks.values()
    task = build_task(facts.recipe)
    rows = _SizeRows(
        config,
        zoo,
        run,
        stored,
        _igpg(run.out),
        _igpg(f"{run.out}/{STAGES}/prior"),
        {name: load(other.out, device="cpu").generator for name, other in others.items()},
    )
    figures: dict[str, float] = {}
    with Reporter().step("ladder", "seen, between, beyond") as bar:
        for index, kind in enumerate(("seen", "between", "beyond")):
            bar.named(index, 3, kind)
            size = getattr(config, kind)
            ladder = SizeLadder(
                task,
                originals[size],
                of_size(zoo.networks[0], varied, size),
                varied,
                best_of=config.best_of,
                num_chosen=config.num_chosen,
                num_condition_samples=run.num_condition_samples,
                num_unlabelled=config.num_unlabelled,
                seed=seed,
            )
            figures |= {f"{kind}_{name}": value for name, value in rows.of(ladder).items()}
        bar.named(3, 3, "done")
    conditions = {
        "trained_sizes": list(stored),
        "values": {size: one.layout.num_values for size, one in originals.items()},
        "training_networks": sum(len(one.values_ND) for one in stored.values()),
        "test_images": len(task.test_y_S),
        "temperature": rows.generator.config.task_loss.temperature,
    }
    return figures, conditions


def _with_starts(config: IGPGDepthsConfig, root: str, zoo: ZooConfig, corpus: Corpus) -> Corpus:
    """Returns the zoo with untrained networks of further sizes, as many of each as it has checkpoints of a size."""
    if not config.igpg_starts:
        return corpus
    recipe = starts_recipe(config, zoo, config.igpg_starts, zoo.seeds_per_task * len(zoo.checkpoint_steps))
    folder = folder_of(root, "zoo-and-starts", {"zoo": zoo.recipe(), "starts": recipe.recipe()})
    if not Storage.at(folder).exists():
        merge(folder, [corpus, trained_zoo(root, recipe)])
    return Corpus.open(folder)


def _trained(
    config: IGPGDepthsConfig, root: str, corpus: Corpus, starts: Corpus, seed: int
) -> tuple[TrainConfig, dict[str, TrainConfig]]:
    """Trains IGPG and the generators without a distribution, and returns their runs."""
    make = partial(load_config, TrainConfig, SHIPPED / "igpg" / "resnet-depths.yaml")
    run_settings = [f"corpus={corpus.location}", f"seed={seed}"]
    out = folder_of(root, "igpg", asdict(make([*config.igpg, *run_settings])))
    run = make([*config.igpg, *run_settings, f"out={out}"])
    others = {}
    for name, generator, given in (("hypernetwork", config.hypernetwork, corpus), ("units", config.units, starts)):
        other = replace(run, method=name, generator=generator, corpus=given.location, out="")
        others[name] = replace(other, out=folder_of(root, name, asdict(other)))
    with Reporter().step("train", "IGPG's tokeniser, prior and task-loss stage, then the hypernetwork") as bar:
        launch([run, others["hypernetwork"]], bar.training)
    with Reporter().step("train", "units, on starts") as bar:
        launch([others["units"]], bar.training)
    return run, others


def _igpg(folder: str) -> IGPG:
    generator = load(folder, device="cpu").generator
    assert isinstance(generator, IGPG)
    return generator.eval()


@dataclass(frozen=True, slots=True)
class _SizeRows:
    """The generators and stored networks behind all rows of a size."""

    config: IGPGDepthsConfig
    zoo: ZooConfig
    run: TrainConfig
    stored: Mapping[int, StoredSize]
    generator: IGPG
    token_prior: IGPG
    others: Mapping[str, Generator]

    def of(self, ladder: SizeLadder) -> dict[str, float]:
        """Returns the accuracy of each row, before and after an epoch of fine-tuning, and the diversity of networks."""
        written_ND = self._written(self.generator, ladder)
        new = ladder.with_new_statistics
        rows = {"original": ladder.original(), "generated": new(written_ND), "generated_stored": written_ND}
        rows |= {"token_prior": new(self._written(self.token_prior, ladder)), "random": new(ladder.random())}
        rows |= {name: new(self._written(other, ladder)) for name, other in self.others.items()}
        if ladder.size not in self.stored:
            rows |= {name: new(values_ND) for name, values_ND in self._resized(ladder).items()}
            rows["average"] = new(ladder.average(self.stored))
        chosen = {name: ladder.chosen(values_ND) for name, values_ND in rows.items()}
        figures = {name: ladder.percent(values_PD) for name, values_PD in chosen.items()}
        starts = {"finetuned_1": chosen["generated"], "random_finetuned_1": chosen["random"]}
        if ladder.size not in self.stored:
            nearest = max(("stretched", "cut"), key=lambda name: figures.get(name, 0.0))
            figures["nearest"] = figures[nearest]
            starts["nearest_finetuned_1"] = chosen[nearest]
        figures |= ladder.fine_tuned(starts, self.zoo.fits()[0], self.config.finetune_rates)
        return figures | {"diversity": ladder.diversity(written_ND)}

    def _resized(self, ladder: SizeLadder) -> dict[str, Tensor]:
        """Resizes networks of the nearest size below, if that can be, and of the nearest one above."""
        below = [one for one in self.stored.values() if one.size < ladder.size and ladder.can_resize(one)]
        above = [one for one in self.stored.values() if one.size > ladder.size]
        rows = {"stretched": ladder.resized(below[-1])} if below else {}
        return rows | ({"cut": ladder.resized(above[0])} if above else {})

    def _written(self, generator: Generator, ladder: SizeLadder) -> Tensor:
        task_loss = self.generator.config.task_loss
        normalizer = None
        if not generator.knows(ladder.layout):
            normalizer = normalizer_of_similar(ladder.layout, generator.normalizers, ladder.start())
        sampling = SamplingConfig(windows=task_loss.windows) if isinstance(generator, IGPG) else None
        return generator.generate(
            GenerationRequest(
                condition=ladder.condition,
                layout=ladder.layout,
                noise=ladder.noise,
                temperature=task_loss.temperature,
                normalizer=normalizer,
                sampling=sampling,
            )
        ).values_BD
