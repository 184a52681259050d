"""Every setting of every shipped method changes what is built, trained or drawn.

A table gives for each setting another value to try and, where it only matters together with others, the settings under
which it matters. A setting that is missing from the tables fails the test, so that none is added that does nothing.

Shape letters beyond the legend in `raywgen.weights`: N networks to draw batches from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Self

import pytest
import torch
import yaml
from torch import Tensor, nn

from raywgen.config import load_config
from raywgen.config_places import PLACE
from raywgen.generators import METHODS, DataSpec, GenerationRequest, Generator, Sampling, Stage
from raywgen.generators.bundle import build_generator
from raywgen.training.engine import LocalEngine
from raywgen.training.schedule import learning_rate
from raywgen.weights import KeyedNoise, Layout, Normalizer, WeightBatch
from tests.builders import NUM_FEATURES, condition

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = "tests.generators.test_every_setting"
_NUM_NETWORKS = 12
_NUM_DRAWN = 3
_DATA = DataSpec(num_features=NUM_FEATURES, max_classes=2, policies=("adam", "sgd"))


@dataclass(frozen=True)
class Try:
    """Another value of a setting, and what must be set besides for the setting to matter.

    Attributes:
        value: Other than the value among the base settings.
        base: Further base settings, `key=value`, under which both values are tried.
    """

    value: str
    base: tuple[str, ...] = ()

    @property
    def typed(self) -> object:
        return yaml.safe_load(self.value)


def tried(value: object, *base: str) -> Try:
    return Try(str(value), base)


class Differences(nn.Module):
    """An encoder of samples by three features."""

    def forward(self, x_SF: Tensor) -> Tensor:
        return x_SF[:, :3] - x_SF[:, 3:6]


def group(name: str, *tables: Mapping[str, Try], base: Sequence[str] = ()) -> dict[str, Try]:
    """Returns tables of settings as those of a group, with base settings that they have in common."""
    merged = {key: each for table in tables for key, each in table.items()}
    return {
        f"{name}.{key}": Try(each.value, (*base, *(setting.replace("*", name) for setting in each.base)))
        for key, each in merged.items()
    }


# In base settings, `*` stands for the name of the group.
OPTIMIZER = {
    "optimizer.kind": tried("sgd"),
    "optimizer.learning_rate": tried(0.03),
    "optimizer.betas": tried("[0.5,0.9]"),
    "optimizer.epsilon": tried(1.0),
    "optimizer.weight_decay": tried(0.9),
    "optimizer.schedule": tried("linear"),
    "optimizer.warmup_steps": tried(10),
    "optimizer.floor": tried(0.9),
    "optimizer.grad_clip": tried(1e-3, "*.optimizer.kind=sgd"),
    "optimizer.ema_decay": tried(0.9),
}
STAGE = {"num_steps": tried(2), "batch_size": tried(4), **OPTIMIZER}
STAGE_BASE = ("*.num_steps=3", "*.batch_size=8", "*.optimizer.learning_rate=0.01", "*.optimizer.warmup_steps=0")
TOKENIZER = {
    **STAGE,
    "chunk_length": tried(4),
    "width": tried(32),
    "commitment": tried(2.0),
    "coder": tried("conv"),
    "coder_layers": tried(2, "*.coder=conv"),
    "context": tried(2, "*.coder=transformer"),
    "output_loss_weight": tried(1.0),
    "window": tried(2),
    "quantiser.kind": tried("gumbel"),
    "quantiser.num_levels": tried(4),
    "quantiser.num_codes": tried(4),
    "quantiser.decay": tried(0.1),
    "quantiser.beam": tried(4),
    "quantiser.revive_below": tried(0.9),
}
NETWORK = {
    "kind": tried("chunks"),
    "width": tried(24),
    "num_layers": tried(2),
    "num_heads": tried(4, "*.kind=chunks"),
    "chunk_length": tried(4, "*.kind=chunks"),
    "window": tried(2, "*.kind=chunks"),
}
_MAX_ROWS = tried(2, "network.kind=chunks", "network.window=2")


def stage_base(name: str, *others: str) -> tuple[str, ...]:
    """Returns the base settings of a stage under test, and those of the other stages."""
    return (*(setting.replace("*", name) for setting in STAGE_BASE), *others)


IGPG = {
    **group(
        "tokenizer",
        TOKENIZER,
        {"scales": tried("tensor")},
        base=stage_base("tokenizer", "prior.num_steps=0", "task_loss.num_steps=0"),
    ),
    **group(
        "prior",
        STAGE,
        {
            "width": tried(24),
            "num_layers": tried(2),
            "num_heads": tried(4),
            "num_kv_heads": tried(1),
            "window": tried(2),
            "text_encoder": tried("bytes"),
            "data_encoder": tried(f"{HERE}:Differences"),
            "condition_dropout": tried(0.5),
            "independent_share": tried(0.5),
            "dropout": tried(0.5),
        },
        base=stage_base("prior", "tokenizer.num_steps=1", "task_loss.num_steps=0"),
    ),
    **group(
        "task_loss",
        STAGE,
        {
            "temperature": tried(5.0),
            "nll_weight": tried(1.0),
            "l2_anchor_weight": tried(1.0),
            "diversity_weight": tried(1.0),
            "condition_dropout": tried(0.9, "prior.condition_dropout=0.5"),
            "windows": tried("parallel", "prior.window=2"),
            "statistics": tried("batch"),
        },
        base=stage_base("task_loss", "tokenizer.num_steps=1", "prior.num_steps=1"),
    ),
    **group(
        "sampling",
        {
            "top_k": tried(1),
            "top_p": tried(0.3),
            "guidance": tried(3.0, "prior.condition_dropout=0.5"),
            "decoding": tried("tokens"),
            "num_averaged": tried(2),
            "chunks": tried("independent"),
            "windows": tried("parallel", "prior.window=2"),
            "overlap": tried(0.75, "prior.window=4"),
            "max_rows": tried(1, "*.chunks=independent"),
            "max_gib": tried(1e-6, "*.chunks=independent"),
            "half_cache": tried("true"),
            "precision": tried("bf16"),
            "compile": tried("always", "*.half_cache=true"),
        },
        base=("tokenizer.num_steps=1", "prior.num_steps=1", "task_loss.num_steps=0"),
    ),
}
MCDI = {
    **group(
        "diffusion",
        {
            "num_steps": tried(8),
            "num_targets": tried(2),
            "targets": tried("naive"),
            "spans": tried("whole"),
            "schedule": tried("linear"),
            "parameterisation": tried("noise"),
            "weighting": tried("paper"),
        },
    ),
    **group("network", NETWORK),
    **group(
        "denoiser",
        STAGE,
        {"meta": tried("joint"), "inner_rate": tried(0.1), "inner_steps": tried(2), "num_draws": tried(1)},
        base=stage_base("denoiser"),
    ),
    **group(
        "task_loss",
        STAGE,
        {"sampling_steps": tried(4), "consistency": tried(3.0)},
        base=stage_base("task_loss", "denoiser.num_steps=1"),
    ),
    **group(
        "sampling",
        {"sampler": tried("stochastic"), "num_steps": tried(3), "max_rows": _MAX_ROWS},
        base=("denoiser.num_steps=1",),
    ),
    **group("tokenizer", TOKENIZER, base=stage_base("tokenizer", "network.kind=latents", "denoiser.num_steps=0")),
}
LOHP = {
    **group("path", {"num_steps": tried(12), "length": tried(1), "noise": tried(0.1)}),
    **group("network", NETWORK),
    **group(
        "policy",
        STAGE,
        {
            "objective": tried("detailed"),
            "lam": tried(0.1),
            "mix": tried(1.0),
            "hybrid": tried("spliced"),
            "flow": tried("joint"),
            "backward": tried("learned"),
            "exploration": tried(2.0),
            "exploration_steps": tried(1),
            "replay_size": tried(2),
            "task_reward": tried(5.0),
        },
        base=stage_base("policy"),
    ),
    **group(
        "task_loss",
        STAGE,
        {"temperature": tried(1.0)},
        base=stage_base("task_loss", "policy.num_steps=1"),
    ),
    **group("sampling", {"num_steps": tried(3), "max_rows": _MAX_ROWS}),
}
DIRECT = {
    **group("network", NETWORK, base=("regression.num_steps=1",)),
    **group("regression", STAGE, base=stage_base("regression")),
    **group("task_loss", STAGE, base=stage_base("task_loss", "regression.num_steps=0")),
}
HYPERNETWORK = {
    "width": tried(24),
    "condition_dropout": tried(0.9),
    "from_base": tried("true"),
    "statistics": tried("batch"),
    **group("task_loss", STAGE, base=stage_base("task_loss")),
}
UNITS = {
    "width": tried(24),
    "num_layers": tried(2),
    "text_encoder": tried("bytes"),
    "code_noise": tried(1.0),
    "num_references": tried(8),
    "statistics": tried("batch"),
    **group("task_loss", STAGE, base=stage_base("task_loss")),
}
TABLES = {
    "igpg": IGPG,
    "mcdi": MCDI,
    "lohp": LOHP,
    "units": UNITS,
    "direct": DIRECT,
    "hypernetwork": HYPERNETWORK,
}
_SMALL = ("network.width=16", "network.num_layers=1", "network.num_heads=2", "network.chunk_length=8")
_SMALL_TOKENIZER = ("tokenizer.chunk_length=8", "tokenizer.width=16", "tokenizer.batch_size=8")
_SMALL_QUANTISER = ("tokenizer.quantiser.num_levels=2", "tokenizer.quantiser.num_codes=8")
BASES = {
    "igpg": (
        *_SMALL_TOKENIZER,
        *_SMALL_QUANTISER,
        *("prior.width=16", "prior.num_layers=1", "prior.num_heads=2", "prior.batch_size=8", "task_loss.batch_size=8"),
    ),
    "mcdi": (
        *_SMALL,
        *_SMALL_TOKENIZER,
        *_SMALL_QUANTISER,
        *("diffusion.num_steps=6", "sampling.num_steps=6", "denoiser.batch_size=8", "denoiser.num_steps=2"),
    ),
    "lohp": (
        *_SMALL,
        *("path.num_steps=6", "path.length=2", "sampling.num_steps=6", "policy.batch_size=8", "policy.num_steps=2"),
    ),
    "direct": (*_SMALL, "regression.batch_size=8"),
    "units": ("width=16", "task_loss.batch_size=8", "task_loss.num_steps=2"),
    "hypernetwork": ("width=16", "task_loss.batch_size=8", "task_loss.num_steps=2"),
}


def settings_of(config: object, prefix: str = "") -> list[str]:
    """Lists the dotted names of all settings, but for places, which change nothing; those of nested groups included."""
    names = []
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        if field.metadata.get(PLACE):
            continue
        value = getattr(config, field.name)
        key = f"{prefix}{field.name}"
        names += settings_of(value, f"{key}.") if dataclasses.is_dataclass(value) else [key]
    return names


def test_the_tables_hold_every_setting() -> None:
    assert set(TABLES) == set(METHODS)
    for name, method in METHODS.items():
        known = settings_of(method.Config())
        assert [key for key in known if key not in TABLES[name]] == [], f"{name}: give these another value to try"
        assert [key for key in TABLES[name] if key not in known] == [], f"{name}: these are no settings of it"


Effect = dict[str, Tensor]
"""Numbers by name, such as the metrics of one training step."""
CASES = [(name, key) for name, table in TABLES.items() for key in table]


@pytest.mark.parametrize(("name", "key"), CASES, ids=[f"{name}-{key}" for name, key in CASES])
def test_a_setting_changes_what_is_built_trained_or_drawn(name: str, key: str) -> None:
    base = (*BASES[name], *TABLES[name][key].base)
    _, expected = base_run(name, base)
    found = effects(build(name, (*base, f"{key}={TABLES[name][key].value}")))
    assert any(differ(one, other) for one, other in zip_longest(expected, found)), f"{name}: {key} changes nothing"


@pytest.mark.parametrize("name", METHODS)
def test_equal_settings_have_equal_effects(name: str) -> None:
    base = (*BASES[name], *next(iter(TABLES[name].values())).base)
    _, expected = base_run(name, base)
    assert not any(differ(one, other) for one, other in zip_longest(expected, effects(build(name, base))))


SAMPLING = [(name, key) for name, key in CASES if key.startswith("sampling.")]


@pytest.mark.parametrize(("name", "key"), SAMPLING)
def test_a_request_draws_by_its_own_sampling(name: str, key: str) -> None:
    generator, expected = base_run(name, (*BASES[name], *TABLES[name][key].base))
    sampling = generator.resolve_sampling({key.removeprefix("sampling."): TABLES[name][key].typed})
    assert not differ(expected[-1], drawn(generator))
    assert differ(expected[-1], drawn(generator, sampling))


def differ(first: Effect | None, other: Effect | None) -> bool:
    """Whether two effects differ in names, shapes, or in more than how they are rounded."""
    if first is None or other is None or first.keys() != other.keys():
        return True
    return any(
        one.shape != other[name].shape or not torch.allclose(one.double(), other[name].double(), rtol=1e-5, atol=1e-7)
        for name, one in first.items()
    )


@lru_cache(maxsize=256)
def base_run(name: str, settings: tuple[str, ...]) -> tuple[Generator, list[Effect]]:
    """Trains a generator by base settings, which many settings have in common; returns it with all effects."""
    generator = build(name, settings)
    return generator, list(effects(generator))


def build(name: str, settings: Sequence[str]) -> Generator:
    layout, module = target()
    base_D = layout.flatten(module.state_dict())
    table = {layout.id: (layout, Normalizer.measure(layout, networks(1).values_BD, base_D))}
    config = load_config(METHODS[name].Config, None, settings)
    return build_generator(name, config, table, _DATA, seed=0)


def effects(generator: Generator) -> Iterator[Effect]:
    """Trains and draws; yields the outcome of each step, so that the first difference ends a comparison."""
    yield {key: value.clone() for key, value in generator.state_dict().items()}
    for number, stage in enumerate(generator.stages()):
        yield from trained(generator, stage, number)
        yield {key: value.clone() for key, value in generator.state_dict().items()}
    yield drawn(generator)


def trained(generator: Generator, stage: Stage, number: int) -> Iterator[Effect]:
    """Trains a stage as the trainer does; yields the metrics of each step, and of a validation at the end."""
    size, num_targets = stage.config.batch_size, max(1, generator.needs.num_targets)
    stage.setup([batch_at(step, size, num_targets) for step in range(2)], 0)
    engine = LocalEngine(stage)
    with RowCounter(stage) as rows:
        for step in range(stage.config.num_steps):
            batch = batch_at(step, size, num_targets)
            torch.manual_seed(step)
            noise = KeyedNoise(0, batch.sample_index_B, 7 + number)
            yield engine.train_step(batch, noise, learning_rate(stage.config, step)) | rows.most()
    held = batch_at(100, 4, num_targets)
    yield engine.evaluate(held, KeyedNoise(1, held.sample_index_B, 7 + number))
    engine.finish()


def drawn(generator: Generator, sampling: Sampling | None = None) -> Effect:
    """The networks of a few conditions, and the most rows that a module is given at once while they are drawn."""
    generator.eval()
    layout, _ = target()
    noise = KeyedNoise(3, torch.arange(_NUM_DRAWN))
    request = GenerationRequest(condition=condition(_NUM_DRAWN, 9), layout=layout, noise=noise, sampling=sampling)
    with RowCounter(generator) as rows:
        result = generator.generate(request)
    log_prob_B = torch.zeros(0) if result.log_prob_B is None else result.log_prob_B
    return {"values": result.values_BD, "log_prob": log_prob_B} | rows.most()


class RowCounter:
    """Counts the rows that a module and its parts are given at once, which some settings bound to save memory.

    Only inputs of three axes are counted: others may hold all rows' positions one after another.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._most = module, 0

    def __enter__(self) -> Self:
        self._hooks = [part.register_forward_pre_hook(self._count) for part in self._module.modules()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = [len(each) for each in inputs if isinstance(each, Tensor) and each.dim() == 3]
        rows += [len(each.values_BD) for each in inputs if isinstance(each, WeightBatch)]
        self._most = max([self._most, *rows])

    def most(self) -> Effect:
        return {"most_rows": torch.tensor(self._most)}


@lru_cache(maxsize=1)
def target() -> tuple[Layout, nn.Module]:
    """A network with batch normalisation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    return Layout.from_state_dict(module.state_dict()), module


@lru_cache(maxsize=8)
def networks(num_targets: int) -> WeightBatch:
    """N networks around a common start, at the ends of straight trajectories from there."""
    layout, module = target()
    base_D = layout.flatten(module.state_dict())
    generator = torch.Generator().manual_seed(1)
    end_ND = base_D + 0.2 * torch.rand(_NUM_NETWORKS, layout.num_values, generator=generator)
    shares_A1 = torch.arange(1, num_targets + 1).unsqueeze(1) / num_targets
    conditions = condition(_NUM_NETWORKS, 0)
    return WeightBatch(
        values_BD=end_ND,
        layout=layout,
        module=module,
        condition=replace(conditions, policies=("adam", "sgd") * (_NUM_NETWORKS // 2)),
        query=condition(_NUM_NETWORKS, 100),
        sample_index_B=torch.arange(_NUM_NETWORKS),
        targets_BAD=base_D + (end_ND - base_D).unsqueeze(1) * shares_A1,
    )


def batch_at(step: int, size: int, num_targets: int) -> WeightBatch:
    """The batch of a step."""
    index_B = torch.arange(size) + step * size
    return replace(networks(num_targets).take(index_B % _NUM_NETWORKS), sample_index_B=index_B)
