"""Every stage of every method, and every path of generation, on a second device: nothing stays behind on the CPU.

The second device is a stand-in, see `tests.second_device`. Losses and networks are compared with those of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from raywgen.benchmarks.cuda_check import MOST_LOSS_DIFF, MOST_VALUE_DIFF, compare, full_precision
from raywgen.benchmarks.device_cases import CASES, DeviceCase, batch_of, build_case, condition_of, target
from raywgen.generators import METHODS, GenerationRequest, Generator
from raywgen.generators.igpg import IGPG
from raywgen.training.checkpoints import own_slices
from raywgen.training.engine import EngineSettings, LocalEngine
from raywgen.weights import KeyedNoise, Layout
from tests.second_device import DEVICE, DevicesDifferError, SecondDevice, SecondDeviceTensor

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # A tensor of the stand-in says that it is on `meta`, but has values to copy to.
    pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter"),
]
HERE = "tests.generators.test_second_device"


class Differences(nn.Module):
    """An encoder of samples by three features, with a table that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(3), persistent=False)

    table: Tensor

    def forward(self, x_SF: Tensor) -> Tensor:
        return (x_SF[:, :3] - x_SF[:, 3:6]) * self.table


def with_encoders() -> DeviceCase:
    case = CASES["igpg"]
    prior = {**case.settings["prior"], "text_encoder": "bytes", "data_encoder": f"{HERE}:Differences"}
    return replace(case, settings={**case.settings, "prior": prior})


@pytest.fixture
def second() -> Iterator[SecondDevice]:
    with SecondDevice() as device:
        yield device


def test_the_stand_in_refuses_tensors_of_both_devices(second: SecondDevice) -> None:
    layer, x = nn.Linear(3, 2).to(DEVICE), torch.ones(4, 3)
    assert isinstance(layer.weight, SecondDeviceTensor)
    with pytest.raises(DevicesDifferError, match="addmm"):
        layer(x)
    layer(x.to(DEVICE)).sum().backward()
    assert isinstance(layer.weight.grad, SecondDeviceTensor)
    assert layer.weight.grad.tolist() == [[4.0] * 3] * 2


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES.values()} == set(METHODS)


# The other cases have more of the same: they are compared with a GPU, where there is one.
COMPARED = {name: case for name, case in CASES.items() if name not in ("igpg", "igpg-beam", "direct-heads")}


@pytest.mark.parametrize("case", [*COMPARED.values(), with_encoders()], ids=[*COMPARED, "igpg-encoders"])
@pytest.mark.usefixtures("second")
def test_a_generator_trains_and_draws_as_on_the_cpu(case: DeviceCase) -> None:
    found = compare(case, DEVICE, num_steps=1)
    # One step and one evaluation of each stage.
    assert {name: len(losses) for name, losses in found.losses.items()} == dict.fromkeys(found.losses, 2)
    assert set(found.losses) == {stage.name for stage in build_case(case).stages()}
    assert found.loss_diff < 1e-5
    assert found.value_diff < 1e-4


@pytest.mark.parametrize("name", ["igpg", "igpg-scales", "mcdi", "units", "hypernetwork"])
@pytest.mark.usefixtures("second")
def test_a_generator_writes_layouts_that_it_does_not_know(name: str) -> None:
    case = CASES[name]
    wider = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).eval()
    layout = Layout.from_state_dict(wider.state_dict())
    start_D = layout.flatten(wider.state_dict())
    if name == "mcdi":
        case = replace(case, settings={**case.settings, "network": {**case.settings["network"], "kind": "chunks"}})
    here, there = build_case(case).eval(), build_case(case).eval().to(DEVICE)
    expected, found = (_drawn(generator, layout, start_D) for generator in (here, there))
    assert found.device == DEVICE
    assert torch.allclose(found.cpu(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["mcdi-heads", "lohp-heads", "direct-heads"])
@pytest.mark.usefixtures("second")
def test_heads_of_any_number_of_classes_are_written(name: str) -> None:
    layout = Layout.from_state_dict(nn.Linear(6, 3).state_dict())
    here, there = build_case(CASES[name]).eval(), build_case(CASES[name]).eval().to(DEVICE)
    expected, found = (_drawn(generator, layout, None) for generator in (here, there))
    assert torch.allclose(found.cpu(), expected, atol=1e-5)


@pytest.mark.usefixtures("second")
def test_log_probabilities_and_shuffled_conditions() -> None:
    layout, _ = target("perceptron")
    values_BD = batch_of(CASES["igpg"], 0, 0).values_BD[:3]
    found = []
    for device in (torch.device("cpu"), DEVICE):
        generator = build_case(CASES["igpg"]).eval().to(device)
        assert isinstance(generator, IGPG)
        found.append(generator.log_prob(values_BD.to(device), condition_of(3, 9).to(device), layout).cpu())
        sampling = generator.resolve_sampling({"chunks": "shuffled"})
        found.append(_drawn(generator, layout, None, sampling=sampling).cpu())
    assert torch.allclose(found[0], found[2], rtol=1e-5)
    assert torch.allclose(found[1], found[3], atol=1e-5)


@pytest.mark.parametrize("name", ["mcdi-heads", "lohp", "direct"])
@pytest.mark.usefixtures("second")
def test_a_batch_is_taken_in_parts(name: str) -> None:
    found = []
    for device in (torch.device("cpu"), DEVICE):
        generator = build_case(CASES[name]).to(device)
        engine = LocalEngine(generator.stages()[0], EngineSettings(accumulate=2))
        batch = batch_of(CASES[name], 0, generator.needs.num_targets).to(device)
        found.append(float(engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), 1e-3)["loss"]))
        slices = own_slices(engine.state(generator), rank=0, num_workers=1).values()
        assert all(part.on_host().values.device == torch.device("cpu") for part in slices)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_trains_and_draws_as_the_cpu_does(name: str) -> None:
    with full_precision():
        found = compare(CASES[name], torch.device("cuda"))
    assert found.loss_diff < MOST_LOSS_DIFF
    assert found.value_diff < MOST_VALUE_DIFF


def _drawn(generator: Generator, layout: Layout, start_D: Tensor | None, **settings: object) -> Tensor:
    device = generator.device
    request = GenerationRequest(
        condition=condition_of(3, 9).to(device),
        layout=layout,
        noise=KeyedNoise(3, torch.arange(3)).to(device),
        normalizer=None if start_D is None else generator.estimate_normalizer(layout, start_D),
        **settings,  # pyright: ignore[reportArgumentType]
    )
    return generator.generate(request).values_BD
