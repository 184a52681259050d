"""Every generator learns from networks with ties, complex weights, masks and wrappers, and writes what loads again.

Shape legend: B networks, D values, k local targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raywgen.generation.fill import TrainedGenerator
from raywgen.generators import GenerationRequest
from raywgen.generators.bundle import build_generator, load_bundle, save_bundle
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.direct import DirectConfig
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.generators.interface import Generator
from raywgen.generators.lohp.config import LoHpConfig, PolicyConfig
from raywgen.generators.mcdi.config import DenoiserConfig, McDiConfig
from raywgen.generators.settings import OptimizerConfig, StageConfig
from raywgen.weights import KeyedNoise, Layout, Normalizer, WeightBatch
from tests.builders import DATA, NUM_FEATURES, condition, igpg_config, train

pytestmark = pytest.mark.usefixtures("one_thread")
INF = float("inf")
NUM = 6
SMALL = NetworkConfig(width=16, num_layers=1)
OPTIMIZER = OptimizerConfig(weight_decay=0.0, warmup_steps=0)
METHODS: dict[str, Callable[[], Any]] = {
    "igpg": igpg_config,
    "hypernetwork": lambda: HypernetworkConfig(width=16, task_loss=StageConfig(num_steps=2)),
    "mcdi": lambda: McDiConfig(network=SMALL, denoiser=DenoiserConfig(num_steps=2, optimizer=OPTIMIZER)),
    "lohp": lambda: LoHpConfig(network=SMALL, policy=PolicyConfig(num_steps=2, optimizer=OPTIMIZER)),
    "direct": lambda: DirectConfig(regression=StageConfig(num_steps=2), task_loss=StageConfig(num_steps=2)),
}


class Strange(nn.Module):
    """Two tied layers, complex weights, a causal mask and a table of integers."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, NUM_FEATURES)
        self.again = nn.Linear(NUM_FEATURES, NUM_FEATURES, bias=False)
        self.again.weight = self.first.weight
        self.spectral = nn.Parameter(torch.randn(NUM_FEATURES, NUM_FEATURES, dtype=torch.complex64) / 4)
        self.register_buffer("mask", torch.full((NUM_FEATURES, NUM_FEATURES), -INF).triu(1))
        self.register_buffer("places", torch.arange(NUM_FEATURES))
        self.head = nn.Linear(NUM_FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.tanh(self.first(x))) @ self.mask.softmax(dim=-1)
        return self.head((torch.fft.fft(x) @ self.spectral).real)


def strange(seed: int) -> Strange:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Strange()


def trained(method: str) -> Generator:
    """After two steps of each stage."""
    # As a corpus has it that was built of files in another order and dtype.
    files = [dict(sorted(strange(seed).state_dict().items())) for seed in range(NUM)]
    layout = Layout.from_state_dict(files[0])
    values_BD = torch.stack([layout.flatten(state) for state in files])
    known = {layout.id: (layout, Normalizer.measure(layout, values_BD, None))}
    generator = build_generator(method, METHODS[method](), known, DATA, seed=0)
    k = max(generator.needs.num_targets, 1)
    module = strange(0)
    batch = WeightBatch(
        values_BD=values_BD,
        layout=replace(layout.arranged_like(layout)),
        module=module,
        condition=replace(condition(NUM), policies=("",) * NUM),
        query=condition(NUM, seed=1),
        sample_index_B=torch.arange(NUM),
        targets_BAD=values_BD.unsqueeze(1) * torch.linspace(0.5, 1, k).view(1, k, 1)
        if generator.needs.num_targets
        else None,
    )
    for stage in generator.stages():
        stage.setup([batch], 0)
        assert all(loss == loss for loss in train(stage, [batch, batch]))
    return generator.eval()


@pytest.fixture(scope="module", params=METHODS)
def generator(request: pytest.FixtureRequest) -> Generator:
    return trained(request.param)


def examples() -> tuple[Tensor, Tensor]:
    one = condition(1)
    return one.samples_BSF[0], one.labels_BS[0]


def filled(generator: Generator, module: nn.Module) -> nn.Module:
    return TrainedGenerator(generator).fill(module, instruction="Is it?", data=examples(), best_of=2)


def assert_filled(module: Strange, before: dict[str, Tensor]) -> None:
    assert module.again.weight is module.first.weight
    assert torch.equal(module.mask, torch.full((NUM_FEATURES, NUM_FEATURES), -INF).triu(1).to(module.mask.dtype))
    for name, value in module.state_dict().items():
        if name in ("mask", "places"):
            assert torch.equal(value, before[name])
        else:
            assert bool(value.isfinite().all()), name
            assert not torch.equal(value, before[name]), name
    assert bool(module.spectral.detach().imag.any())


@pytest.mark.filterwarnings("error::raywgen.generation.UnknownLayoutWarning")
@pytest.mark.parametrize("wrap", ["plain", "compiled", "parallel"])
def test_a_module_is_filled_as_what_it_is(generator: Generator, wrap: str) -> None:
    module = strange(99)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wrappers: dict[str, Callable[[nn.Module], Any]] = {
        "plain": lambda inner: inner,
        "compiled": torch.compile,
        "parallel": nn.DataParallel,
    }
    wrapped = wrappers[wrap](module)
    assert filled(generator, wrapped) is wrapped
    assert_filled(module, before)


@pytest.mark.filterwarnings("error::raywgen.generation.UnknownLayoutWarning")
def test_equal_modules_get_equal_values_whatever_their_form(generator: Generator, tmp_path) -> None:
    save_bundle(generator, tmp_path, {})
    again = load_bundle(tmp_path)
    one, inner = strange(1), strange(1)
    inner.first = torch.compile(inner.first)  # pyright: ignore[reportAttributeAccessIssue]
    filled(generator, one)
    filled(again, inner)
    for left, right in zip(one.state_dict().values(), inner.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_written_state_dicts_hold_ties_and_kept_tensors(generator: Generator) -> None:
    module = strange(3)
    layout = generator.layout_of(module.state_dict())
    assert generator.knows(layout)
    values_BD = generator.generate(
        GenerationRequest(condition=condition(2), layout=layout, noise=KeyedNoise(0, torch.arange(2)))
    ).values_BD
    for values_D in values_BD:
        state = layout.unflatten(values_D, counters=module.state_dict())
        assert list(state) == list(module.state_dict())
        assert state["first.weight"].data_ptr() == state["again.weight"].data_ptr()
        layout.check(state)
        module.load_state_dict(state)


@pytest.mark.filterwarnings("error::raywgen.generation.UnknownLayoutWarning")
def test_a_bfloat16_module_is_filled_too() -> None:
    generator = trained("hypernetwork")
    module = strange(4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.first.bfloat16()
    module.head.bfloat16()
    module.again.weight = module.first.weight
    layout = generator.layout_of(module.state_dict())
    values_1D = generator.generate(
        GenerationRequest(condition=condition(1), layout=layout, noise=KeyedNoise(0, torch.arange(1)))
    ).values_BD
    module.load_state_dict(layout.unflatten(values_1D[0], counters=before))
    assert module.first.weight.dtype == torch.bfloat16
    same = strange(4)
    known = generator.layout_of(same.state_dict())
    again_1D = generator.generate(
        GenerationRequest(condition=condition(1), layout=known, noise=KeyedNoise(0, torch.arange(1)))
    ).values_BD
    assert torch.equal(values_1D, again_1D)
