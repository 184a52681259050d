"""Measures IGPG on held-out tasks, beside baselines without tokens, and the effect of coherence between chunks.

Tasks are sets of five of MNIST's digits and, separately, domains of its images: rotated, scaled, pale, inverted. All
methods get the same labelled examples, and choose among equally many candidates by their loss on these.

Coherence is the paper's central claim. Networks of the prior before any task-loss stage are decoded from their tokens,
drawn chunk after chunk (`coherent`), each chunk without sight of the others (`independent`), and chunk after chunk with
the condition of another task (`shuffled`), from a shared start and from starts of their own.

Shape letters beyond the legend in `raywgen.weights`: T tasks, n candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import Chosen, TrainingConfig, trained_runs, trained_zoo
from raywgen.benchmarks.unseen_tasks import UnseenTasks, unseen_tasks
from raywgen.config import SHIPPED, load_config
from raywgen.corpus import Corpus
from raywgen.generation import load
from raywgen.generators import Generated, GenerationRequest, OptimizerConfig, StageConfig
from raywgen.generators.direct import DirectConfig
from raywgen.generators.igpg import IGPG, IGPGConfig, IGPGTaskLossConfig, PriorConfig, SamplingConfig
from raywgen.generators.igpg.config import Chunks
from raywgen.training.run_folder import STAGES
from raywgen.training.session import ray_session
from raywgen.weights import Condition, KeyedNoise
from raywgen.zoo import ZooConfig

_ZOOS = SHIPPED / "zoo"
KINDS = {"subsets": "mnist-subsets.yaml", "domains": "mnist-unseen-domains.yaml"}
_OFF = StageConfig(num_steps=0)


@dataclass(kw_only=True)
class IGPGTasksConfig(TrainingConfig):
    """The tasks and the generators to compare.

    Attributes:
        data: Training images, in place of the recipes' MNIST.
        test_data: Test images, likewise.
        kinds: Kinds of tasks: `subsets`, whose figures begin with `unseen_`, and `domains`, with `domain_`;
            none for coherence alone.
        starts: Starts of the networks for which coherence is measured: `shared`, `own`.
        zoo: Overrides of the zoo of subsets, such as `["num_seen_tasks=400"]`.
        domains_zoo: Overrides of the zoo of domains.
        igpg: The generator; part of its networks train with every chunk on its own, for `independent`.
        steps: Training steps of regression and hypernetwork.
        shot: Labelled examples of each class in every condition.
        best_of: Candidates per task.
        temperature: Sampling temperature of the tokens.
    """

    data: str = ""
    test_data: str = ""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    starts: list[str] = field(default_factory=lambda: ["shared", "own"])
    zoo: list[str] = field(default_factory=list)
    domains_zoo: list[str] = field(default_factory=list)
    igpg: IGPGConfig = field(
        default_factory=lambda: IGPGConfig(
            prior=PriorConfig(independent_share=0.25),
            # As many networks as the hypernetwork sees.
            task_loss=IGPGTaskLossConfig(num_steps=800, batch_size=32, optimizer=OptimizerConfig(learning_rate=3e-3)),
        )
    )
    steps: int = 800
    shot: int = 10
    best_of: int = 4
    temperature: float = 0.5
    out: str = "runs/benchmarks/igpg-tasks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds={self.kinds}: give some of {', '.join(KINDS)}")
        if not self.kinds and not self.starts:
            raise ValueError("kinds=[] starts=[]: nothing is left to measure; give some kinds, or some starts")
        if not set(self.starts) <= {"shared", "own"}:
            raise ValueError(f"starts={self.starts}: give some of shared, own")
        if min(self.shot, self.best_of) < 1:
            raise ValueError(f"shot={self.shot}, best_of={self.best_of}: must be at least 1")
        if self.starts and not 0 < self.igpg.prior.independent_share < 1:
            raise ValueError("igpg.prior.independent_share: coherence is measured with a share between 0 and 1")

    def generators(self) -> Chosen:
        """Returns the rows that are trained on networks from a shared start."""
        stage = StageConfig(num_steps=self.steps, batch_size=32, optimizer=OptimizerConfig(weight_decay=0.0))
        return {
            "igpg": ("igpg", self.igpg),
            "regression": ("direct", DirectConfig(regression=stage, task_loss=_OFF)),
            "hypernetwork": ("direct", DirectConfig(regression=_OFF, task_loss=stage)),
        }


def measure(config: IGPGTasksConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains zoos and generators for every seed, then compares them on the unseen tasks."""
    root = config.root()
    rows = []
    for seed in config.all_seeds:
        row: dict[str, float] = {}
        for kind in config.kinds:
            prefix = "unseen" if kind == "subsets" else "domain"
            row |= {f"{prefix}_{name}": value for name, value in _ladder(config, root, kind, seed).items()}
        for start in config.starts:
            row |= {f"{start}_{name}": value for name, value in _coherence(config, root, start, seed).items()}
        rows.append(row)
    figures, spreads = over_seeds(rows)
    conditions = {"each_seed": rows, "best_of": config.best_of, "shot": config.shot}
    return figures, config.conditions(spreads) | conditions


def zoo_of(config: IGPGTasksConfig, kind: str, start: str, seed: int) -> ZooConfig:
    """Returns the recipe of the zoo for one kind of tasks."""
    given = {"tasks.path": config.data, "tasks.test_path": config.test_data}
    data_keys = [f"{key}={value}" for key, value in given.items() if value]
    own = config.zoo if kind == "subsets" else config.domains_zoo
    return load_config(ZooConfig, _ZOOS / KINDS[kind], [*data_keys, *own, f"start={start}", f"seed={seed}"])


def _trained(
    config: IGPGTasksConfig, root: str, kind: str, start: str, seed: int, chosen: Chosen
) -> tuple[Corpus, dict]:
    with ray_session():
        corpus = trained_zoo(root, zoo_of(config, kind, start, seed))
        return corpus, trained_runs(config, root, corpus, chosen, shot=config.shot, seed=seed)


def _ladder(config: IGPGTasksConfig, root: str, kind: str, seed: int) -> dict[str, float]:
    """Measures the accuracy of generated networks and of the baselines, in percent."""
    corpus, runs = _trained(config, root, kind, "shared", seed, config.generators())
    unseen = unseen_tasks(corpus, "unseen", config.shot, seed)
    last = max(corpus.facts.column("step").to_pylist())
    stored_ND = corpus.values(corpus.query(["split=train", f"step={last}"]))
    igpg = _igpg(runs["igpg"])
    generators = {
        "generated": igpg,
        "token_prior": _igpg(f"{runs['igpg']}/{STAGES}/prior"),
        "regression": load(runs["regression"], device="cpu").generator,
        "hypernetwork": load(runs["hypernetwork"], device="cpu").generator,
    }
    figures = {"original": unseen.percent(unseen.originals_TD)}
    figures["reconstructed"] = unseen.percent(igpg.reconstruct(unseen.originals_TD, unseen.layout))
    for name, generator in generators.items():
        figures[name] = chosen_percent(unseen, _candidates(config, unseen, generator.generate, seed))
    told = unseen.told_the_next_task()
    figures["shuffled"] = chosen_percent(told, _candidates(config, told, igpg.generate, seed))
    figures["nearest"] = unseen.percent(stored_ND[unseen.best_of(stored_ND)])
    figures["average"] = unseen.percent(stored_ND.mean(dim=0).expand(len(unseen.tasks), -1))
    draws = torch.randn(
        len(unseen.tasks), config.best_of, stored_ND.shape[1], generator=torch.Generator().manual_seed(seed)
    )
    figures["gaussian"] = chosen_percent(unseen, stored_ND.mean(dim=0) + stored_ND.std(dim=0) * draws)
    return figures


def _coherence(config: IGPGTasksConfig, root: str, start: str, seed: int) -> dict[str, float]:
    """Measures the accuracy of one prior's networks by how their chunks were drawn, in percent."""
    plain = replace(config.igpg, task_loss=replace(config.igpg.task_loss, num_steps=0))
    corpus, runs = _trained(config, root, "subsets", start, seed, {f"prior_{start}": ("igpg", plain)})
    unseen, generator = unseen_tasks(corpus, "unseen", config.shot, seed), _igpg(runs[f"prior_{start}"])

    def drawn(chunks: Chunks) -> float:
        sampling = SamplingConfig(chunks=chunks, decoding="tokens")

        def generate(request: GenerationRequest) -> Generated:
            return generator.generate(replace(request, sampling=sampling))

        return unseen.percent(_candidates(replace(config, best_of=1), unseen, generate, seed)[:, 0])

    return {chunks: drawn(chunks) for chunks in get_args(Chunks)}


def _igpg(folder: str) -> IGPG:
    generator = load(folder, device="cpu").generator
    assert isinstance(generator, IGPG)
    return generator


def _candidates(
    config: IGPGTasksConfig, unseen: UnseenTasks, generate: Callable[[GenerationRequest], Generated], seed: int
) -> Tensor:
    """Generates `best_of` networks for each task, `(T, n, D)`."""
    condition: Condition = unseen.condition.repeat(config.best_of)
    noise = KeyedNoise(seed, torch.arange(len(condition)), 0)
    request = GenerationRequest(condition=condition, layout=unseen.layout, noise=noise, temperature=config.temperature)
    written = generate(request).values_BD
    return written.view(len(unseen.tasks), config.best_of, -1)


def chosen_percent(unseen: UnseenTasks, values_TnD: Tensor) -> float:
    """Returns the mean accuracy, in percent, of each task's candidate with the lowest loss on its examples."""
    losses_Tn = torch.stack([unseen.example_loss(index, values_nD) for index, values_nD in enumerate(values_TnD)])
    return unseen.percent(values_TnD[torch.arange(len(values_TnD)), losses_Tn.argmin(dim=1)])
