"""The settings of the few-shot benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field

from raywgen.benchmarks.trained import Chosen, Headline, TrainingConfig, all_variants, chosen_variants
from raywgen.evaluation.few_shot.reptile_config import ReptileConfig
from raywgen.generators import OptimizerConfig
from raywgen.generators.lohp import LoHpConfig, PolicyConfig
from raywgen.generators.mcdi import McDiConfig, McDiSampling
from raywgen.generators.mcdi.config import DenoiserConfig, McDiTaskLossConfig

# Chosen on validation episodes of Omniglot among some 16. It stays near the encoder's own values: the further
# meta-training moved it, the fewer steps a task needed and the lower it ended.
REPTILE = ReptileConfig(
    head_learning_rate=0.03,
    meta_rate=0.01,
    num_meta_steps=100,
    symmetric_head=True,
    augment="shift-2",
    bf16=True,
)


def _optimizer() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)


@dataclass(kw_only=True)
class FewShotConfig(TrainingConfig):
    """The methods to train and compare, and their episodes.

    Attributes:
        generator: `mcdi`, or `lohp` for its rows beside those of Mc-Di.
        data: Images of meta-training.
        test_data: Images of the same form with the classes to test on; without it groups of `data` are held out.
        group: Column whose groups stay in one split of the classes; empty to split class by class.
        way: Classes of an episode.
        shot: Support images of each class.
        num_query: Query images of each class.
        num_episodes: Test episodes.
        num_validation: Episodes of validation classes, for the choice of settings.
        encoder_episodes: Episodes that train the encoder.
        encoder_way: Classes of each of these episodes.
        encoder_domains: Domains that their images are seen in.
        num_tasks: Tasks of meta-training.
        methods: Rows of generators; all by default.
        mcdi: Settings of Mc-Di.
        task_loss: Mc-Di's task-loss stage, for the row `mcdi_task_loss`.
        lohp: Settings of Lo-Hp.
        reptile: Meta-training of Reptile, which begins at the encoder.
        reptile_episodes: Test episodes of Reptile, which takes longest; 0 leaves it out.
    """

    generator: Headline = "mcdi"
    data: str = ""
    test_data: str = ""
    group: str = "alphabet"
    way: int = 5
    shot: int = 1
    num_query: int = 15
    num_episodes: int = 1000
    num_validation: int = 400
    encoder_episodes: int = 1800
    encoder_way: int = 60
    encoder_domains: list[str] = field(default_factory=lambda: ["plain"])
    num_tasks: int = 4000
    methods: list[str] = field(default_factory=list)
    mcdi: McDiConfig = field(
        default_factory=lambda: McDiConfig(
            sampling=McDiSampling(num_steps=4),
            denoiser=DenoiserConfig(meta="joint", num_steps=300, batch_size=128, optimizer=_optimizer()),
        )
    )
    task_loss: McDiTaskLossConfig = field(default_factory=lambda: McDiTaskLossConfig(num_steps=200, sampling_steps=4))
    lohp: LoHpConfig = field(
        default_factory=lambda: LoHpConfig(policy=PolicyConfig(num_steps=300, batch_size=128, optimizer=_optimizer()))
    )
    reptile: ReptileConfig = field(default_factory=lambda: REPTILE)
    reptile_episodes: int = 1000
    out: str = "runs/benchmarks/few-shot"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variants()
        for name in ("way", "shot", "num_query", "num_episodes", "num_validation", "num_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.data:
            raise ValueError("data is empty: name the images, for instance data=omniglot-background.parquet")

    def variants(self) -> Chosen:
        """Returns the generators to train."""
        return chosen_variants(
            self.generator, self.methods, all_variants(self.generator, self.mcdi, self.task_loss, self.lohp)
        )
