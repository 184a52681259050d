"""Settings of the benchmark of written adapters of a causal language model, and the zoo and runs that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from raywgen.benchmarks.recipes import SeededConfig, folder_of
from raywgen.benchmarks.small_decoder import DecoderConfig
from raywgen.config import SHIPPED, load_config
from raywgen.training import TrainConfig
from raywgen.zoo import ZooConfig

METHODS = ("hypernetwork", "igpg")
_RECIPE = "domain-lora"
_SHARED = "raywgen.benchmarks.shared_network:SharedNetwork"


@dataclass(kw_only=True)
class LoRACausalConfig(SeededConfig):
    """The domains, the model, and what adapters are compared.

    Attributes:
        data: Texts in Parquet form, with the columns `sentence` and `label`; needed.
        left_out: Files of texts that only unseen domains have, and these alone; without, unseen domains are of `data`.
        base: A causal language model of transformers; its folder or `hf:NAME`. By default a small one is trained.
        decoder: The small one; `decoder.paths` are the files that it is trained on, and needed without `base`.
        distributed: Whether the zoo is trained over Ray actors, or in this process.
        methods: Generators: `hypernetwork`, `igpg` or both.
        shot: Texts of a domain.
        rates: Learning rates of gradient training.
        steps: Numbers of its steps.
        shared_rates: Learning rates of the shared adapter, in units of the spread of the stored adapters.
        zoo: Overrides of the zoo's recipe, such as `[num_seen_tasks=20]`.
        hypernetwork: Overrides of the shipped run of the hypernetwork, such as `[generator.task_loss.num_steps=100]`.
        igpg: Overrides of IGPG's.
        shared: Overrides of the runs of the shared adapter, as for the hypernetwork.
    """

    data: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    base: str = ""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    distributed: bool = True
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    shot: int = 16
    rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])
    steps: list[int] = field(default_factory=lambda: [5, 10, 20, 40])
    shared_rates: list[float] = field(default_factory=lambda: [0.1, 1.0])
    zoo: list[str] = field(default_factory=list)
    hypernetwork: list[str] = field(default_factory=list)
    igpg: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    out: str = "runs/benchmarks/lora-causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data: give Parquet files of texts, such as data=[text-trec.parquet,text-cr.parquet]")
        if not self.base and not self.decoder.paths:
            raise ValueError(
                "base: give a causal language model, or the files that a small one is trained on, such as "
                "decoder.paths=[text-mr.parquet]"
            )
        if not self.methods or not set(self.methods) <= set(METHODS):
            raise ValueError(f"methods={self.methods}: give some of {', '.join(METHODS)}")
        if min([self.shot, *self.steps], default=0) < 1 or not self.steps:
            raise ValueError("shot and steps: give at least one of each, all above 0")
        if min(self.rates, default=0) <= 0 or min(self.shared_rates, default=0) <= 0:
            raise ValueError("rates and shared_rates: give at least one of each, all above 0")

    def zoo_of(self, seed: int, base: str) -> ZooConfig:
        """Returns the zoo's recipe for a seed and a model."""
        given = [f"tasks.base={base}", f"seed={seed}", f"tasks.num_unseen_paths={len(self.left_out)}"]
        given += [f"tasks.paths=[{','.join([*self.data, *self.left_out])}]"]
        return load_config(ZooConfig, SHIPPED / "zoo" / f"{_RECIPE}.yaml", [*given, *self.zoo])

    @staticmethod
    def shared_name(rate: float) -> str:
        """Returns the name of the run of the shared adapter at a rate."""
        return f"shared-{rate:g}"

    def runs(self, root: str, corpus: str, seed: int) -> dict[str, TrainConfig]:
        """Returns the training runs of generators and shared adapters, each in a folder of its own."""
        given = {name: (SHIPPED / name / f"{_RECIPE}.yaml", list(getattr(self, name))) for name in self.methods}
        given |= {self.shared_name(rate): (None, self._shared_settings(rate)) for rate in self.shared_rates}
        runs: dict[str, TrainConfig] = {}
        for name, (path, own) in given.items():
            settings = [f"corpus={corpus}", f"seed={seed}", f"shot={self.shot}", *own]
            recipe: Mapping[str, Any] = asdict(load_config(TrainConfig, path, settings)) | {"out": ""}
            runs[name] = load_config(TrainConfig, path, [*settings, f"out={folder_of(root, name, recipe)}"])
        return runs

    def _shared_settings(self, rate: float) -> list[str]:
        """Returns the settings of the shared adapter's run: those of the hypernetwork, where both have them."""
        like = load_config(TrainConfig, SHIPPED / "hypernetwork" / f"{_RECIPE}.yaml", self.hypernetwork)
        stage: Any = like.generator
        settings = [f"{name}={getattr(like, name)}" for name in ("num_workers", "num_query_samples", "precision")]
        names = ("num_steps", "batch_size")
        settings += [f"generator.task_loss.{name}={getattr(stage.task_loss, name)}" for name in names]
        settings += [f"generator.task_loss.optimizer.learning_rate={rate}"]
        return [f"method={_SHARED}", *settings, *self.shared]
