"""Measures accuracy and time of each way to generate a network that is longer than the prior's window.

On a zoo of small networks from a shared start the prior alone, without a task-loss stage, writes networks that work.
Two priors see equally many tokens: one is trained on whole networks, one on random windows of a fraction of them. The
first writes whole networks at once; the second writes the same tasks in every mode, and whole networks, longer than
anything it was trained on. Each trains a quarter of its networks with every chunk on its own.

Before anything is timed, windows that hold all chunks must give the whole network's tokens, bit for bit.

Shape letters beyond the legend in `raywgen.weights`: T tasks, n candidates, M chunks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import TrainingConfig, trained_runs, trained_zoo
from raywgen.benchmarks.unseen_tasks import UnseenTasks, unseen_tasks
from raywgen.generation import generate_best, load
from raywgen.generators import GenerationRequest
from raywgen.generators.igpg import IGPG, IGPGConfig, IGPGTaskLossConfig, PriorConfig, SamplingConfig
from raywgen.generators.igpg.windows import plan_windows
from raywgen.tasks import build_network
from raywgen.training.session import ray_session
from raywgen.weights import KeyedNoise, Layout
from raywgen.zoo import ZooConfig

MODES = {
    "sequential_0.25": SamplingConfig(windows="sequential", overlap=0.25),
    "sequential_0.5": SamplingConfig(windows="sequential", overlap=0.5),
    "parallel": SamplingConfig(windows="parallel"),
    "independent": SamplingConfig(chunks="independent"),
}
WHOLE, BEYOND = "whole", "beyond_window"
_MILLISECONDS = 1e3


@dataclass(kw_only=True)
class IGPGWindowsConfig(TrainingConfig):
    """The priors to train and compare.

    Attributes:
        num_workers: Ray Train workers; 0 trains in this process, and the zoo as well.
        zoo: Recipe of a zoo of one architecture, from a shared start.
        igpg: The generator; the window of its prior is that of the second prior alone.
        shot: Labelled examples of each class in every condition.
        best_of: Candidates per task.
        temperature: Sampling temperature of the tokens.
        batches: Numbers of networks that are generated at once, for each of which time is measured.
        rounds: Rounds of timing; in each of them every mode is timed once.
        threads: Threads of torch while time is measured.
    """

    zoo: ZooConfig = field(default_factory=lambda: ZooConfig(networks=[[64, 14, 2]]))
    igpg: IGPGConfig = field(
        default_factory=lambda: IGPGConfig(
            prior=PriorConfig(num_steps=300, window=16, independent_share=0.25),
            task_loss=IGPGTaskLossConfig(num_steps=0),
        )
    )
    shot: int = 32
    best_of: int = 4
    temperature: float = 0.5
    batches: list[int] = field(default_factory=lambda: [1, 24])
    rounds: int = 7
    threads: int = 1
    num_workers: int = 0
    out: str = "runs/benchmarks/igpg-windows"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.shot, self.best_of, self.threads, *self.batches) < 1 or self.rounds < 2:
            raise ValueError(
                f"shot={self.shot}, best_of={self.best_of}, threads={self.threads}, batches={self.batches}: must be at "
                f"least 1, rounds={self.rounds} at least 2"
            )
        if len(self.zoo.networks) != 1 or self.zoo.start != "shared":
            raise ValueError("zoo: windows are measured on one architecture from a shared start")
        if not 0 < self.igpg.prior.window < self.num_chunks:
            raise ValueError(
                f"igpg.prior.window={self.igpg.prior.window}: a network has {self.num_chunks} chunks; give fewer, so "
                "that there are several windows"
            )

    @property
    def num_chunks(self) -> int:
        """Number of chunks of a network, M."""
        (recipe,) = self.zoo.network_recipes()
        num_values = Layout.from_state_dict(build_network(recipe).state_dict()).num_values
        return -(-num_values // self.igpg.tokenizer.chunk_length)

    def generators(self) -> dict[str, tuple[str, IGPGConfig]]:
        """Returns both priors; the one on windows has as many more of them in a batch as they are shorter."""
        prior = self.igpg.prior
        larger = prior.batch_size * self.num_chunks // prior.window
        return {
            "whole": ("igpg", replace(self.igpg, prior=replace(prior, window=0))),
            "windows": ("igpg", replace(self.igpg, prior=replace(prior, batch_size=larger))),
        }


def measure(config: IGPGWindowsConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures accuracy and likelihood for every seed, then time with the first seed's priors."""
    root = config.root()
    rows, ratios, first = [], {}, {}
    for seed in config.all_seeds:
        unseen, priors = _trained(config, root, seed)
        check_equal(priors[WHOLE], unseen)
        rows.append(qualities(config, unseen, priors, seed))
        if not first:
            first, ratios = times(config, unseen, priors)
    figures, spreads = over_seeds(rows)
    conditions = {
        "each_seed": rows, "chunks": config.num_chunks, "window": config.igpg.prior.window,
        "num_windows": _num_windows(config), "best_of": config.best_of, "temperature": config.temperature,
        "shot": config.shot, "ratio_quartiles": ratios, "threads": config.threads,
    }  # fmt: skip
    return figures | first, config.conditions(spreads) | conditions


def _trained(config: IGPGWindowsConfig, root: str, seed: int) -> tuple[UnseenTasks, dict[str, IGPG]]:
    # Without workers all of it runs in this process, and needs no Ray.
    over_ray = config.num_workers > 0
    with ray_session() if over_ray else nullcontext():
        corpus = trained_zoo(root, replace(config.zoo, seed=seed), distributed=over_ray)
        runs = trained_runs(config, root, corpus, config.generators(), shot=config.shot, seed=seed)
    priors: dict[str, IGPG] = {}
    for name, run in runs.items():
        generator = load(run, device="cpu").generator
        assert isinstance(generator, IGPG)
        priors[name] = generator
    return unseen_tasks(corpus, "unseen", config.shot, seed), priors


@contextmanager
def window_of(generator: IGPG, window: int) -> Iterator[None]:
    """Gives the prior another window for a while."""
    before, generator.prior.config.window = generator.prior.config.window, window
    try:
        yield
    finally:
        generator.prior.config.window = before


def check_equal(generator: IGPG, unseen: UnseenTasks) -> None:
    """Checks that windows that hold all chunks write the same network as without windows."""
    num_chunks = len(generator.tokenizer.positions(unseen.layout))
    noise = KeyedNoise(0, torch.arange(len(unseen.tasks)))
    whole = generator.generate(
        GenerationRequest(condition=unseen.condition, layout=unseen.layout, noise=noise.first(len(unseen.tasks)))
    )
    for window in (num_chunks, num_chunks + 5):
        for name in ("sequential_0.25", "sequential_0.5", "parallel"):
            with window_of(generator, window):
                noise = KeyedNoise(0, torch.arange(len(unseen.tasks)))
                other = generator.generate(
                    GenerationRequest(
                        condition=unseen.condition, layout=unseen.layout, noise=noise, sampling=MODES[name]
                    )
                )
            for one, same in ((whole.values_BD, other.values_BD), (whole.log_prob_B, other.log_prob_B)):
                assert one is not None
                assert same is not None
                assert torch.equal(one, same), f"{name}: a window of {window} chunks is not the whole network"


def modes_of(priors: dict[str, IGPG]) -> Iterator[tuple[str, IGPG, int, SamplingConfig]]:
    """Yields the name of each mode, its prior, window and sampling."""
    yield WHOLE, priors["whole"], 0, SamplingConfig()
    yield BEYOND, priors["windows"], 0, SamplingConfig()
    for name, sampling in MODES.items():
        yield name, priors["windows"], priors["windows"].prior.config.window, sampling


def qualities(config: IGPGWindowsConfig, unseen: UnseenTasks, priors: dict[str, IGPG], seed: int) -> dict[str, float]:
    """Returns accuracy on unseen tasks in percent, and nats per token of networks that were trained on them.

    Networks are decoded from the expected code, as by default, and from the drawn tokens. The latter shows more of what
    a mode loses, because expected codes of independent chunks are the same for every candidate.
    """
    figures = {"original": unseen.percent(unseen.originals_TD)}
    figures["reconstructed"] = unseen.percent(priors["whole"].reconstruct(unseen.originals_TD, unseen.layout))
    num_tokens = config.num_chunks * config.igpg.tokenizer.quantiser.num_levels
    for name, generator, window, sampling in modes_of(priors):
        with window_of(generator, window):
            for decoded, decoding in (("", "expected"), ("tokens_", "tokens")):
                best = generate_best(
                    generator,
                    unseen.condition,
                    unseen.layout,
                    unseen.module,
                    best_of=config.best_of,
                    temperature=config.temperature,
                    seed=seed,
                    sampling=replace(sampling, decoding=decoding),
                )
                figures[f"{decoded}{name}"] = unseen.percent(best.values_BD)
            log_prob_T = generator.log_prob(unseen.originals_TD, unseen.condition, unseen.layout, sampling)
        figures[f"nats_{name}"] = -float(log_prob_T.mean()) / num_tokens
    for decoded in ("", "tokens_"):
        for name in (BEYOND, *MODES):
            figures[f"{decoded}over_whole_{name}"] = figures[f"{decoded}{name}"] - figures[f"{decoded}{WHOLE}"]
    return figures


def times(
    config: IGPGWindowsConfig, unseen: UnseenTasks, priors: dict[str, IGPG]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns milliseconds per network and speed-ups over whole networks: medians over rounds, with quartiles."""
    figures: dict[str, float] = {}
    spreads: dict[str, list[float]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        for batch in config.batches:
            taken: dict[str, list[float]] = {}
            for _ in range(config.rounds + 1):
                for name, generator, window, sampling in modes_of(priors):
                    with window_of(generator, window):
                        taken.setdefault(name, []).append(_seconds(generator, unseen, batch, sampling))
            for name, seconds in taken.items():
                # The first round sets up what later ones reuse.
                figures[f"ms_{name}_at_{batch}"] = _MILLISECONDS * median(seconds[1:]) / batch
                if name != WHOLE:
                    ratios = [whole / mine for whole, mine in zip(taken[WHOLE][1:], seconds[1:], strict=True)]
                    figures[f"speedup_{name}_at_{batch}"] = median(ratios)
                    spreads[f"{name}_at_{batch}"] = [round(each, 3) for each in quantiles(ratios, n=4)[::2]]
    finally:
        torch.set_num_threads(before)
    return figures, spreads


def _seconds(generator: IGPG, unseen: UnseenTasks, batch: int, sampling: SamplingConfig) -> float:
    index_B: Tensor = torch.arange(batch) % len(unseen.tasks)
    noise = KeyedNoise(0, torch.arange(batch))
    begin = time.perf_counter()
    generator.generate(
        GenerationRequest(
            condition=unseen.condition.take(index_B),
            layout=unseen.layout,
            noise=noise,
            temperature=0.5,
            sampling=sampling,
        )
    )
    return time.perf_counter() - begin


def _num_windows(config: IGPGWindowsConfig) -> dict[str, int]:
    window = config.igpg.prior.window
    return {name: len(plan_windows(config.num_chunks, window, sampling)) for name, sampling in MODES.items()}
