"""Writes low-rank adapters of a sentence encoder for tasks that were never seen, beside training and other baselines.

Tasks are "Is the sentence about S1, or about S2?", with S1 and S2 disjoint sets of the classes of a text set; unseen
ones recombine the classes on sentences that nothing was trained on, or with `heldout` have a class that no other task
had.
All rows are judged with the same head, ridge regression on the same examples, its strength by leaving each out.

    head_16            accuracy in percent, 16 examples a class, of the encoder as it is
    average_16         of the mean of the stored adapters
    nearest_16         of the stored adapter that fits the examples best, each left out in turn
    gradient_16        of an adapter trained on the examples, at the rate and steps that are best on validation tasks
    gradient_all_16    of the zoo's own adapters, trained on all training sentences of the task
    shared_16          of one adapter for all tasks, trained by the loss of all for as many steps as the hypernetwork
    hypernetwork_16, igpg_16, mcdi_16, lohp_16    of what these write from examples (and instruction, the first two)
    shuffled_16        of what the best of these writes for the examples and the instruction of another task
    ms_ROW_16          CPU milliseconds that an adapter takes; 0 where it is made once

Conditions hold standard errors over tasks, and paired differences to the shared adapter and to gradient training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import mean, pstdev
from typing import Any

from rich.console import Console
from rich.table import Table

from raywgen.benchmarks.lora_rows import AdapterRows, Row
from raywgen.benchmarks.recipes import SeededConfig, folder_of, over_seeds
from raywgen.benchmarks.shared_network import SharedNetwork
from raywgen.benchmarks.trained import trained_zoo
from raywgen.config import SHIPPED, load_config
from raywgen.corpus import Corpus
from raywgen.generation import load
from raywgen.generators import Generator
from raywgen.progress import Reporter
from raywgen.training import TrainConfig, launch
from raywgen.training.session import ray_session
from raywgen.trust import trusting
from raywgen.zoo import ZooConfig

_METHODS = ("hypernetwork", "igpg", "mcdi", "lohp")
_RECIPE = "sentence-lora.yaml"
_SHARED = "raywgen.benchmarks.shared_network:SharedNetwork"
_PERCENT = 100.0
_BESIDE = ("shared", "gradient")


@dataclass(kw_only=True)
class LoRAConfig(SeededConfig):
    """The tasks, and what adapters are compared.

    Attributes:
        data: Sentences in Parquet form, with the columns `sentence` and `label`; needed.
        classes: Classes that tasks are made of; those of the recipe for TREC by default, `[]` with `class_names` for
            all of another set.
        class_names: Names of the set's classes, for the instructions; those of TREC by default.
        heldout: A class that seen tasks never have, and every unseen one does; -1 for none.
        methods: Generators: some of `hypernetwork`, `igpg`, `mcdi`, `lohp`.
        shots: Examples of each class.
        rates: Learning rates of gradient training.
        steps: Numbers of its steps.
        zoo: Overrides of the zoo's recipe, such as `[num_seen_tasks=20]`.
        hypernetwork: Overrides of the shipped run of the hypernetwork, such as `[generator.task_loss.num_steps=100]`.
        igpg: Overrides of IGPG's.
        mcdi: Overrides of Mc-Di's.
        lohp: Overrides of Lo-Hp's.
        shared: Overrides of the run of the shared adapter, as for the hypernetwork.
    """

    data: str = ""
    classes: list[int] | None = None
    class_names: list[str] | None = None
    heldout: int = -1
    methods: list[str] = field(default_factory=lambda: list(_METHODS))
    shots: list[int] = field(default_factory=lambda: [16, 64])
    rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])
    steps: list[int] = field(default_factory=lambda: [10, 20, 40, 80])
    zoo: list[str] = field(default_factory=list)
    hypernetwork: list[str] = field(default_factory=list)
    igpg: list[str] = field(default_factory=list)
    mcdi: list[str] = field(default_factory=list)
    lohp: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    out: str = "runs/benchmarks/lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data: give a Parquet file of sentences, such as data=text-trec.parquet")
        if not self.methods or not set(self.methods) <= set(_METHODS):
            raise ValueError(f"methods={self.methods}: give some of {', '.join(_METHODS)}")
        if min([*self.shots, *self.steps], default=0) < 1 or min(self.rates, default=0) <= 0:
            raise ValueError("shots, steps and rates: give at least one of each, all above 0")

    def zoo_of(self, seed: int) -> ZooConfig:
        """Returns the zoo's recipe for a seed."""
        given = [f"tasks.path={self.data}", f"seed={seed}"]
        given += [] if self.classes is None else [f"tasks.classes={self.classes}"]
        given += [] if self.class_names is None else [f"tasks.class_names={self.class_names}"]
        given += [] if self.heldout < 0 else [f"tasks.heldout_classes=[{self.heldout}]"]
        return load_config(ZooConfig, SHIPPED / "zoo" / _RECIPE, [*given, *self.zoo])


def measure(config: LoRAConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains zoo and generators for every seed, and judges what they write for the unseen tasks."""
    root, figures, details = config.root(), [], []
    for seed in config.all_seeds:
        with ray_session():
            corpus = trained_zoo(root, config.zoo_of(seed))
        generators = _trained(config, root, corpus, seed)
        own: dict[str, float] = {}
        for shot in config.shots:
            rows, chosen = _rows(config, corpus, generators, shot, seed)
            _print(shot, rows)
            own |= {f"{name}_{shot}": row.percent for name, row in rows.items()}
            own |= {f"ms_{name}_{shot}": row.milliseconds for name, row in rows.items()}
            details.append({"seed": seed, "shot": shot, "gradient": chosen, **_spreads(rows)})
        figures.append(own)
    means, spreads = over_seeds(figures)
    conditions = {"data": config.data, "heldout": config.heldout, "each": details, "each_seed": figures}
    return means, config.conditions(spreads) | conditions


def _trained(config: LoRAConfig, root: str, corpus: Corpus, seed: int) -> dict[str, Generator]:
    """Trains the generators and the shared adapter, or finds them trained."""
    runs: dict[str, TrainConfig] = {}
    for name in [*config.methods, "shared"]:
        given = [f"corpus={corpus.location}", f"seed={seed}", *getattr(config, name)]
        path = SHIPPED / name / _RECIPE
        if name == "shared":
            path, given = None, [*_shared_settings(config, seed, corpus), *given]
        run = load_config(TrainConfig, path, given)
        out = folder_of(root, name, asdict(run) | {"out": ""})
        runs[name] = load_config(TrainConfig, path, [*given, f"out={out}"])
    with trusting("raywgen"):
        with Reporter().step("train", ", ".join(runs)) as bar:
            launch(list(runs.values()), bar.training)
        return {name: load(run.out, device="cpu").generator for name, run in runs.items()}


def _shared_settings(config: LoRAConfig, seed: int, corpus: Corpus) -> list[str]:
    """Returns the settings of the shared adapter's run: those of the hypernetwork, where both have them."""
    given = [f"corpus={corpus.location}", f"seed={seed}", *config.hypernetwork]
    like = load_config(TrainConfig, SHIPPED / "hypernetwork" / _RECIPE, given)
    names = ("num_workers", "num_condition_samples", "num_query_samples", "precision")
    stage: Any = like.generator
    settings = [f"{name}={getattr(like, name)}" for name in names]
    settings += [f"generator.task_loss.{name}={getattr(stage.task_loss, name)}" for name in ("num_steps", "batch_size")]
    return [f"method={_SHARED}", *settings]


def _rows(
    config: LoRAConfig, corpus: Corpus, generators: Mapping[str, Generator], shot: int, seed: int
) -> tuple[dict[str, Row], dict[str, float]]:
    """Judges every row on the unseen tasks; returns the rate and the steps of gradient training, too."""
    unseen, validation = (AdapterRows(corpus, split, shot, seed) for split in ("unseen", "validation"))
    (stored_ND, _), shared = unseen.stored(), generators["shared"]
    assert isinstance(shared, SharedNetwork)
    (layout_id,) = corpus.networks
    start_D = corpus.base_values(layout_id)
    assert start_D is not None, "the recipe's networks share their start"
    tried = validation.gradient(start_D, config.rates, config.steps)
    rate, steps = max(tried, key=lambda key: tried[key].percent)
    rows = {
        "head": unseen.head(),
        "average": unseen.one_for_all(stored_ND.mean(dim=0)),
        "nearest": unseen.nearest(),
        "gradient": unseen.gradient(start_D, [rate], [steps])[rate, steps],
        "gradient_all": unseen.trained_on_all(),
        "shared": unseen.one_for_all(shared.network(unseen.layout).detach()),
    }
    rows |= {name: unseen.written(generators[name]) for name in config.methods}
    best = max(config.methods, key=lambda name: validation.written(generators[name]).percent)
    rows["shuffled"] = unseen.written(generators[best], shift=1)
    return rows, {"rate": rate, "steps": steps}


def _spreads(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Returns standard errors over tasks, and paired differences with those of their means."""
    errors = {name: round(row.error, 2) for name, row in rows.items()}
    differences = {}
    for name in (*_METHODS, "shuffled"):
        for other in _BESIDE:
            if name in rows:
                gains = (_PERCENT * (rows[name].accuracy_T - rows[other].accuracy_T)).tolist()
                differences[f"{name} - {other}"] = [round(mean(gains), 2), round(pstdev(gains) / len(gains) ** 0.5, 2)]
    return {"standard_errors": errors, "paired_differences": differences}


def _print(shot: int, rows: Mapping[str, Row]) -> None:
    table = Table(f"{shot} examples a class", "accuracy", "±", "ms an adapter")
    for name, row in rows.items():
        table.add_row(name, f"{row.percent:.1f}", f"{row.error:.1f}", f"{row.milliseconds:.1f}")
    Console().print(table)
