"""Modules of a user, on the CPU, filled by a generator that is on a second device; see `tests.second_device`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from raywgen.benchmarks.device_cases import CASES, build_case, condition_of
from raywgen.generation import TrainedGenerator
from tests.second_device import DEVICE, SecondDevice, SecondDeviceTensor

pytestmark = [pytest.mark.usefixtures("one_thread", "second"), pytest.mark.filterwarnings("ignore::UserWarning")]
CPU = torch.device("cpu")


@pytest.fixture
def second() -> Iterator[None]:
    with SecondDevice():
        yield


class Masked(nn.Module):
    """A network with batch normalisation, and with a buffer that is in no `state_dict`."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        self.register_buffer("mask", torch.ones(6), persistent=False)

    def forward(self, x_SF: torch.Tensor) -> torch.Tensor:
        return self.layers(x_SF * self.mask)


def trained(name: str, device: torch.device) -> TrainedGenerator:
    return TrainedGenerator(build_case(CASES[name]).eval().to(device))


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are on the CPU and have nearly equal values."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(not isinstance(b, SecondDeviceTensor) and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("settings", [{"best_of": 3}, {"best_of": 2, "unlabelled": True}], ids=["best", "statistics"])
def test_a_module_is_filled_as_on_the_cpu(settings: dict[str, int]) -> None:
    examples = condition_of(1, 5)
    data = examples.samples_BSF[0], examples.labels_BS[0]
    given = dict(settings)
    extra: dict[str, Any] = {"unlabelled": data[0]} if given.pop("unlabelled", 0) else {}
    made = [
        trained("igpg", device).fill_with_report(Masked(), instruction="Is it?", data=data, **given, **extra)
        for device in (CPU, DEVICE)
    ]
    assert same(made[0].module, made[1].module)
    assert made[0].on_samples == made[1].on_samples
    assert made[0].log_prob == pytest.approx(made[1].log_prob, rel=1e-5)


def test_a_module_is_adapted_as_on_the_cpu() -> None:
    examples = condition_of(1, 5)
    support = examples.samples_BSF[0], examples.labels_BS[0]
    made = [trained("mcdi-heads", device).adapt(nn.Linear(6, 2), support, quiet=True) for device in (CPU, DEVICE)]
    assert same(made[0], made[1])
