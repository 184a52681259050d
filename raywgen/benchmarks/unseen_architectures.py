"""Has generators fill architectures that no corpus held, on tasks that nothing was trained on.

Perceptrons of other widths and convolutional networks of other channels, with and without biases, on label subsets of
scikit-learn's digits. Every figure is a share of the accuracy of networks of the same architecture that were trained on
the task itself, mean over tasks: its mean over architectures, and its worst. The rows:

    units          written unit by unit, trained by the task's loss on starts of other architectures
    shuffled       the same, with the samples of another task
    hypernetwork   written chunk by chunk, trained likewise
    nearest        the stored network, of the nearest layout of the zoo of trained ones, with the lowest loss on the
                   samples; it has an architecture of its own
    gradient       trained from a random start on the same samples; rate and steps are chosen on validation tasks

Generated networks are the best of equally many by the same 64 labelled samples; the nearest one is chosen among all
that are stored, and gradient training has one start. Whether a user would be told of a failure is
measured on good and deliberately poor networks together: `collapse_recall` is the share of networks below 0.8 of a
trained one that were warned of, `false_alarms` the share of all others that were.

Shape letters beyond the legend in `raywgen.weights`: T tasks, n candidates.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import Chosen, TrainingConfig, trained_runs, trained_zoo
from raywgen.benchmarks.unseen_tasks import UnseenTasks, fitted
from raywgen.config import SHIPPED, load_config
from raywgen.corpus import Corpus
from raywgen.generation import load
from raywgen.generation.best import Best, generate_best
from raywgen.generators import Generator, StageConfig
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.generators.units import UnitsConfig
from raywgen.progress import Reporter
from raywgen.tasks import FitConfig, FitData, Recorded, Task, build_network, build_task, draw_condition, fit
from raywgen.tasks.linear_reference import left_out_accuracy
from raywgen.tasks.networks import network_name, network_recipe
from raywgen.tasks.standing import standing
from raywgen.training import load_train_config
from raywgen.training.session import ray_session
from raywgen.weights import Condition, KeyedNoise, Layout
from raywgen.zoo import ZooConfig

_HIDDEN = ([13], [15], [20], [24], [33], [13, 8], [15, 15], [20, 13], [24, 12], [33, 20], [13, 33], [20, 7])
_CHANNELS = ([7], [11], [18], [7, 9], [9, 14], [13, 22])
_CONDITION_STREAM = 4_000
_START_SEED = 1 << 20
_COLLAPSED = 0.8
_FAILED = 0.8
_MILLISECONDS = 1e3
_NUM_TIMED = 5


def _architectures() -> list[Any]:
    perceptrons = [
        {"name": "mlp", "widths": [64, *hidden, 2], "bias": bias} for bias in (True, False) for hidden in _HIDDEN
    ]
    return perceptrons + [
        {"name": "cnn", "channels": channels, "num_classes": 2, "bias": bias}
        for bias in (True, False)
        for channels in _CHANNELS
    ]


@dataclass(kw_only=True)
class UnseenArchitecturesConfig(TrainingConfig):
    """The architectures, and the training of the generators.

    Attributes:
        architectures: Networks on 64 features that the corpus of starts does not hold.
        zoo: Overrides of the zoo of starts.
        trained_zoo: Overrides of the zoo of trained networks, from which the nearest is taken.
        units: Overrides of the shipped training run.
        hypernetwork: The hypernetwork that writes chunks; by default it is trained for as many steps as the units.
        num_samples: Labelled samples of each task.
        best_of: Candidates of each network.
        temperature: Temperature of the candidates.
        rates: Learning rates of gradient training.
        steps: Numbers of its steps.
        poor_share: Share of the training steps of the generator that is deliberately poor.
        distributed: Whether zoos are trained over Ray; in this process otherwise.
    """

    architectures: list[Any] = field(default_factory=_architectures)
    zoo: list[str] = field(default_factory=list)
    trained_zoo: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)
    hypernetwork: HypernetworkConfig | None = None
    num_samples: int = 64
    best_of: int = 8
    temperature: float = 0.5
    rates: list[float] = field(default_factory=lambda: [3e-3, 1e-2, 3e-2])
    steps: list[int] = field(default_factory=lambda: [10, 30, 100])
    poor_share: float = 0.05
    distributed: bool = True
    num_workers: int = 0
    out: str = "runs/benchmarks/unseen-architectures"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.architectures:
            raise ValueError("architectures=[]: give some networks, such as [[64,13,2]]")
        if min(self.num_samples, self.best_of) < 1 or not 0 < self.poor_share < 1:
            raise ValueError(
                f"num_samples={self.num_samples}, best_of={self.best_of}, poor_share={self.poor_share}: give numbers "
                "of at least 1, and a share between 0 and 1"
            )

    def generators(self) -> Chosen:
        """Returns the generators, each trained on the starts."""
        given = [f"generator.{override}" for override in self.units]
        config = load_train_config(str(SHIPPED / "units" / "digits-architectures.yaml"), given).generator
        assert isinstance(config, UnitsConfig)
        stage = config.task_loss
        poor = replace(stage, num_steps=max(1, int(self.poor_share * stage.num_steps)))
        chunks = self.hypernetwork or HypernetworkConfig(
            task_loss=StageConfig(num_steps=stage.num_steps, batch_size=stage.batch_size)
        )
        return {
            "units": ("units", config),
            "poor": ("units", replace(config, task_loss=poor)),
            "hypernetwork": ("hypernetwork", chunks),
        }


def measure(config: UnseenArchitecturesConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains corpora and generators for every seed, then fills the architectures."""
    root = config.root()
    rows, each = [], {}
    for seed in config.all_seeds:
        figures, ratios = _one_seed(config, root, seed)
        rows.append(figures)
        each[seed] = ratios
    figures, spreads = over_seeds(rows)
    figures["failed_seeds"] = sum(row["worst_ratio"] < _FAILED for row in rows)
    return figures, config.conditions(spreads) | {"each_seed": rows, "ratios": each, "best_of": config.best_of}


def _one_seed(config: UnseenArchitecturesConfig, root: str, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    own = [*config.zoo, f"seed={seed}"]
    starts_recipe = load_config(ZooConfig, SHIPPED / "zoo" / "digits-architectures.yaml", own)
    stored_recipe = load_config(ZooConfig, None, [*config.trained_zoo, f"seed={seed}"])
    with ray_session() if config.distributed or config.num_workers else nullcontext():
        starts, stored = (
            trained_zoo(root, recipe, distributed=config.distributed) for recipe in (starts_recipe, stored_recipe)
        )
        runs = trained_runs(config, root, starts, config.generators(), shot=0, seed=seed)
    generators = {name: load(folder, device="cpu").generator for name, folder in runs.items()}
    _check_tasks(starts, stored)
    tasks, held = _tasks(starts, "unseen"), _tasks(starts, "validation")
    condition = _condition(config, tasks, seed)
    linear = [left_out_accuracy(*one) for one in zip(condition.samples_BSF, condition.labels_BS, strict=True)]
    ratios: dict[str, dict[str, float]] = {}
    collapses: list[Tensor] = []
    ms: list[float] = []
    with Reporter().step("judge", f"{len(config.architectures)} architectures") as bar:
        for done, architecture in enumerate(config.architectures):
            recipe = network_recipe(architecture)
            unseen, validation = (_with_samples(config, recipe, part, seed) for part in (tasks, held))
            unseen = replace(unseen, originals_TD=_trained(recipe, unseen.layout, tasks, stored_recipe.fits()[0], seed))
            assert unseen.layout.id not in starts.networks, f"{network_name(recipe)} is in the corpus; leave it out"
            trained_T = unseen.accuracy(unseen.originals_TD)
            accuracy: dict[str, Tensor] = {}
            for name, generator in generators.items():
                best = _generated(config, unseen, generator, seed)
                accuracy[name] = unseen.accuracy(best.values_BD)
                warned_T = _warned_of(best, unseen.condition, config.best_of, linear)
                collapses.append(torch.stack([accuracy[name] < _COLLAPSED * trained_T, warned_T], dim=1))
            shuffled = _generated(config, unseen.told_the_next_task(), generators["units"], seed)
            accuracy["shuffled"] = unseen.accuracy(shuffled.values_BD)
            accuracy["nearest"] = _nearest(stored, stored_recipe, unseen)
            accuracy["gradient"] = torch.tensor([_gradient(config, unseen, validation)])
            ratios[network_name(recipe)] = {
                name: round(float(value_T.mean() / trained_T.mean()), 4) for name, value_T in accuracy.items()
            }
            ms.append(_milliseconds(unseen, generators["units"], seed))
            bar.update(done + 1, len(config.architectures))
    return _figures(ratios, torch.cat(collapses)) | {"ms_units": round(median(ms), 3)}, ratios


def _figures(ratios: Mapping[str, Mapping[str, float]], collapses_N2: Tensor) -> dict[str, float]:
    """Returns means and worst cases of all rows, and of the units also for some groups of architectures.

    Args:
        ratios: Share of the accuracy of trained networks, by architecture and row.
        collapses_N2: Whether each of N networks collapsed, and whether it was warned of, bool.
    """
    groups = {"": lambda _: True, "mlp_": lambda name: name.startswith("mlp"), "cnn_": lambda name: name[:3] == "cnn"}
    groups["no_bias_"] = lambda name: "False" in name
    figures: dict[str, float] = {}
    for prefix, belongs in groups.items():
        values = [row["units"] for name, row in ratios.items() if belongs(name)]
        if values:
            figures |= {f"{prefix}mean_ratio": mean(values), f"{prefix}worst_ratio": min(values)}
    for row in ("shuffled", "hypernetwork", "nearest", "gradient", "poor"):
        values = [each[row] for each in ratios.values()]
        figures |= {f"{row}_mean_ratio": mean(values), f"{row}_worst_ratio": min(values)}
    collapsed_N, warned_N = collapses_N2.unbind(dim=1)
    figures["collapsed_share"] = float(collapsed_N.float().mean())
    figures["collapse_recall"] = float(warned_N[collapsed_N].float().mean()) if collapsed_N.any() else 1.0
    figures["false_alarms"] = float(warned_N[~collapsed_N].float().mean()) if (~collapsed_N).any() else 0.0
    return figures


def _check_tasks(starts: Corpus, stored: Corpus) -> None:
    """Refuses zoos of which one was trained on what the other holds out.

    Raises:
        ValueError: A task is unseen in one, and seen in the other.
    """
    unseen = {task.task_id for task in starts.tasks.values() if task.split == "unseen"}
    if known := sorted(unseen & {task.task_id for task in stored.tasks.values() if task.split == "seen"}):
        raise ValueError(
            f"trained_zoo is trained on {known[0]}, which zoo holds out; give both the same numbers of tasks"
        )


def _tasks(corpus: Corpus, split: str) -> list[Task]:
    return [build_task(task.recipe) for task in corpus.tasks.values() if task.split == split]


def _condition(config: UnseenArchitecturesConfig, tasks: list[Task], seed: int) -> Condition:
    noise = KeyedNoise(seed, torch.arange(len(tasks)), _CONDITION_STREAM)
    return draw_condition(tasks, config.num_samples, noise)


def _with_samples(
    config: UnseenArchitecturesConfig, recipe: Mapping[str, Any], tasks: list[Task], seed: int
) -> UnseenTasks:
    """Returns the tasks with their samples for networks of an architecture, of which none is trained yet."""
    torch.manual_seed(seed)
    module = build_network(recipe)
    layout = Layout.from_state_dict(module.state_dict())
    return UnseenTasks(
        layout=layout,
        module=module.eval(),
        tasks=tasks,
        condition=_condition(config, tasks, seed),
        originals_TD=torch.empty(0, layout.num_values),
    )


def _trained(recipe: Mapping[str, Any], layout: Layout, tasks: list[Task], config: FitConfig, seed: int) -> Tensor:
    """Trains a network on each task as the zoo of trained ones does, each from a start of its own."""
    num = len(tasks)
    states = []
    for index in range(num):
        torch.manual_seed(_START_SEED + seed * num + index)
        states.append(build_network(recipe).state_dict())
    start = Recorded(step=0, state_N={name: torch.stack([state[name] for state in states]) for name in states[0]})
    data = FitData.joined([task.train_inputs for task in tasks], torch.stack([task.train_y_S for task in tasks]))
    (last,) = fit(build_network(recipe), start, data, config, order_seeds=range(num), record_steps=[config.num_steps])
    return torch.stack([layout.flatten({key: value[n] for key, value in last.state_N.items()}) for n in range(num)])


def _generated(config: UnseenArchitecturesConfig, told: UnseenTasks, generator: Generator, seed: int) -> Best:
    """Generates networks for what is told, the best of some for each task."""
    return generate_best(
        generator,
        told.condition,
        told.layout,
        told.module,
        best_of=config.best_of,
        temperature=config.temperature,
        seed=seed,
        normalizer=generator.estimate_normalizer(told.layout, told.layout.flatten(told.module.state_dict())),
    )


def _warned_of(best: Best, condition: Condition, best_of: int, linear: Sequence[float]) -> Tensor:
    """Returns for each network whether its user would be warned of it, bool `(T,)`."""
    each = zip(best.logits_BSC, condition.labels_BS, linear, strict=True)
    return torch.tensor([standing(logits_SC, labels_S, best_of, one).is_doubtful for logits_SC, labels_S, one in each])


def _nearest(stored: Corpus, zoo: ZooConfig, unseen: UnseenTasks) -> Tensor:
    """Returns the accuracy `(T,)` of the stored networks, of the layout nearest in size, that fit the samples best."""
    size = unseen.layout.num_values
    layout_id = min(stored.networks, key=lambda key: abs(stored.networks[key].layout.num_values - size))
    network = stored.networks[layout_id]
    rows = stored.query([f"layout_id={layout_id}", "split=train", f"step={zoo.num_steps}"])
    values_ND = stored.values(rows)
    own = replace(unseen, layout=network.layout, module=build_network(network.recipe).eval())
    return own.accuracy(values_ND[own.best_of(values_ND)])


def _gradient(config: UnseenArchitecturesConfig, unseen: UnseenTasks, validation: UnseenTasks) -> float:
    """Returns the mean accuracy of gradient training on the samples, its rate and steps chosen on validation tasks."""
    start_D = unseen.layout.flatten(unseen.module.state_dict())
    rate, steps = fitted(validation, start_D, config.rates, config.steps).best()
    return fitted(unseen, start_D, [rate], [steps]).percent[rate, steps] / 100


def _milliseconds(unseen: UnseenTasks, generator: Generator, seed: int) -> float:
    """Returns the milliseconds in which one network is written and judged on the samples, the median of some."""
    taken: list[float] = []
    for _ in range(_NUM_TIMED):
        begin = time.perf_counter()
        generate_best(
            generator,
            unseen.condition_of(0),
            unseen.layout,
            unseen.module,
            best_of=1,
            temperature=0.0,
            seed=seed,
            normalizer=generator.estimate_normalizer(unseen.layout, unseen.originals_TD[0]),
        )
        taken.append(_MILLISECONDS * (time.perf_counter() - begin))
    return median(taken)
