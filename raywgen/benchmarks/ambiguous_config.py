"""The settings of the benchmark of tasks that a few samples leave open."""

from __future__ import annotations

from dataclasses import dataclass, field

from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.trained import Chosen, TrainingConfig
from raywgen.benchmarks.whole_network import WholeNetworkConfig
from raywgen.config import load_config
from raywgen.generators import OptimizerConfig, StageConfig
from raywgen.generators.direct import DirectConfig
from raywgen.generators.igpg import IGPGConfig, IGPGTaskLossConfig, PriorConfig

KINDS = ("subsets", "characters")
METHODS = ("igpg", "mcdi", "lohp")
_OFF = StageConfig(num_steps=0)


@dataclass(kw_only=True)
class AmbiguousTasksConfig(TrainingConfig):
    """The tasks, and the generators that write several networks for each.

    Attributes:
        kinds: Kinds of tasks: `subsets` of MNIST's digits, for which whole networks are written, and `characters` of
            Omniglot, for which heads are.
        data: Training images of the subsets, in place of the recipe's MNIST.
        test_data: Test images, likewise.
        characters: Images of characters.
        shots: Labelled samples of each class; generators are trained for each number.
        num_networks: Networks that are written for a task, and hypernetworks that the ensemble has.
        methods: Generators that are compared with it.
        zoo: Overrides of the zoo of subsets, such as `["num_seen_tasks=400"]`.
        few_shot: Overrides of encoder, tasks and generators of characters, which are those of the benchmark `few-shot`.
        whole: Overrides of the generators of subsets, which are those of the benchmark `whole-network`.
        igpg: IGPG, of which parts of the condition are left out in training, since it is told the samples alone.
        steps: Training steps of each hypernetwork.
        temperatures: Temperatures, of which each generator gets the best on validation tasks.
        noises: Sizes of the noise on one hypernetwork's weights, in units of each tensor's scale, chosen likewise.
    """

    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    data: str = ""
    test_data: str = ""
    characters: str = ""
    shots: list[int] = field(default_factory=lambda: [1, 2])
    num_networks: int = 4
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    zoo: list[str] = field(default_factory=list)
    few_shot: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    igpg: IGPGConfig = field(
        default_factory=lambda: IGPGConfig(
            prior=PriorConfig(condition_dropout=0.3),
            task_loss=IGPGTaskLossConfig(
                num_steps=800, batch_size=32, condition_dropout=0.6, optimizer=OptimizerConfig(learning_rate=3e-3)
            ),
        )
    )
    steps: int = 800
    temperatures: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])
    noises: list[float] = field(default_factory=lambda: [0.03, 0.1, 0.3])
    out: str = "runs/benchmarks/ambiguous-tasks"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given, known in (("kinds", self.kinds, KINDS), ("methods", self.methods, METHODS)):
            if not given or not set(given) <= set(known):
                raise ValueError(f"{name}={given}: give some of {', '.join(known)}")
        if "characters" in self.kinds and not self.characters:
            raise ValueError(
                "characters=: give images of characters, such as omniglot-background.parquet, or kinds=[subsets]"
            )
        if not self.shots or min(self.shots) < 1 or self.num_networks < 2:
            raise ValueError(
                f"shots={self.shots}, num_networks={self.num_networks}: give at least one sample, and two networks"
            )
        if not self.temperatures or not self.noises:
            raise ValueError("temperatures, noises: give at least one of each")

    def few_shot_config(self) -> FewShotConfig:
        """Returns the settings of characters."""
        return load_config(FewShotConfig, None, [f"data={self.characters}", *self.few_shot])

    def _base(self, kind: str) -> FewShotConfig | WholeNetworkConfig:
        return load_config(WholeNetworkConfig, None, self.whole) if kind == "subsets" else self.few_shot_config()

    def generators(self, kind: str) -> Chosen:
        """Returns the generators of a kind of tasks, with one hypernetwork."""
        base = self._base(kind)
        rows = base.variants()
        every: Chosen = {
            "igpg": ("igpg", self.igpg),
            "mcdi": rows["mcdi_task_loss"],
            "lohp": rows.get("lohp_task_loss", ("lohp", base.lohp)),
        }
        return {name: every[name] for name in self.methods}

    def hypernetwork(self, kind: str) -> DirectConfig:
        """Returns the hypernetwork, with the network of Mc-Di."""
        base = self._base(kind)
        stage = StageConfig(num_steps=self.steps, batch_size=32, optimizer=OptimizerConfig(weight_decay=0.0))
        return DirectConfig(network=base.mcdi.network, regression=_OFF, task_loss=stage)
