"""Settings of the benchmark of written adapters, and the zoo and runs that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raywgen.benchmarks.recipes import SeededConfig, folder_of
from raywgen.config import SHIPPED, load_config
from raywgen.training import TrainConfig
from raywgen.zoo import ZooConfig

METHODS = ("hypernetwork", "igpg", "mcdi", "lohp")
Family = Literal["groups", "words"]
_RECIPE = "sentence-lora"
_SHARED = "raywgen.benchmarks.shared_network:SharedNetwork"


@dataclass(kw_only=True)
class LoRAConfig(SeededConfig):
    """The tasks, and what adapters are compared.

    Attributes:
        data: Sentences in Parquet form, with the columns `sentence` and `label`; needed.
        others: Further files of sentences. Seen tasks are then made of these alone, and unseen ones of `data` alone,
            which is left out whole; classes are numbered on in this order, those of `data` last.
        family: `groups` of classes, or questions about `words` and lengths, which need no labels.
        classes: Classes that tasks are made of; those of the recipe for TREC by default, `[]` with `class_names` for
            all of other sets.
        class_names: Names of the classes, for the instructions; those of TREC by default.
        heldout: A class that seen tasks never have, and every unseen one does; -1 for none.
        distributed: Whether the zoo is trained over Ray actors, or in this process.
        draws: Times that examples are drawn for each unseen task.
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
    others: list[str] = field(default_factory=list)
    family: Family = "groups"
    classes: list[int] | None = None
    class_names: list[str] | None = None
    heldout: int = -1
    distributed: bool = True
    draws: int = 1
    methods: list[str] = field(default_factory=lambda: list(METHODS))
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
        if not self.methods or not set(self.methods) <= set(METHODS):
            raise ValueError(f"methods={self.methods}: give some of {', '.join(METHODS)}")
        if min([*self.shots, *self.steps, self.draws], default=0) < 1 or min(self.rates, default=0) <= 0:
            raise ValueError("shots, steps, rates and draws: give at least one of each, all above 0")
        if self.others and self.heldout >= 0:
            raise ValueError(f"heldout={self.heldout} with others: data is left out whole; give one of both")

    def zoo_of(self, seed: int) -> ZooConfig:
        """Returns the zoo's recipe for a seed."""
        given = [f"tasks.path={self.data}", f"seed={seed}", f"tasks.kind=sentence-{self.family}"]
        if self.others:
            given += [f"tasks.paths=[{','.join([*self.others, self.data])}]", "tasks.num_unseen_paths=1"]
        given += [] if self.classes is None else [f"tasks.classes={self.classes}"]
        given += [] if self.class_names is None else [f"tasks.class_names={self.class_names}"]
        given += [] if self.heldout < 0 else [f"tasks.heldout_classes=[{self.heldout}]"]
        return load_config(ZooConfig, SHIPPED / "zoo" / f"{_RECIPE}.yaml", [*given, *self.zoo])

    def runs(self, root: str, corpus: str, seed: int) -> dict[str, TrainConfig]:
        """Returns the training runs of the generators and of the shared adapter, each in a folder of its own."""
        runs: dict[str, TrainConfig] = {}
        for name in [*self.methods, "shared"]:
            given = [f"corpus={corpus}", f"seed={seed}", *getattr(self, name)]
            path = SHIPPED / name / f"{_RECIPE}.yaml"
            if name == "shared":
                path, given = None, [*self._shared_settings(seed, corpus), *given]
            recipe: Mapping[str, Any] = asdict(load_config(TrainConfig, path, given)) | {"out": ""}
            runs[name] = load_config(TrainConfig, path, [*given, f"out={folder_of(root, name, recipe)}"])
        return runs

    def _shared_settings(self, seed: int, corpus: str) -> list[str]:
        """Returns the settings of the shared adapter's run: those of the hypernetwork, where both have them."""
        given = [f"corpus={corpus}", f"seed={seed}", *self.hypernetwork]
        like = load_config(TrainConfig, SHIPPED / "hypernetwork" / f"{_RECIPE}.yaml", given)
        names = ("num_workers", "num_condition_samples", "num_query_samples", "precision")
        stage: Any = like.generator
        settings = [f"{name}={getattr(like, name)}" for name in names]
        settings += [
            f"generator.task_loss.{name}={getattr(stage.task_loss, name)}" for name in ("num_steps", "batch_size")
        ]
        return [f"method={_SHARED}", *settings]
