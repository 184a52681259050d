"""Modules that are built on disk or without values have the same parameters as those built in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from raywgen.benchmarks.device_cases import CASES, build_case
from raywgen.nn import parameter_places
from raywgen.training.step_meter import anonymous_bytes


@pytest.mark.parametrize("name", CASES)
def test_a_generator_built_on_disk_has_the_values_of_one_in_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_places, "_LEAST_BYTES", 0)
    plain = build_case(CASES[name]).state_dict()
    with parameter_places.on_disk():
        mapped = build_case(CASES[name]).state_dict()
    assert mapped.keys() == plain.keys()
    assert all(torch.equal(mapped[key], tensor) for key, tensor in plain.items())


@pytest.mark.parametrize("name", CASES)
def test_a_generator_without_values_has_the_names_and_shapes(name: str) -> None:
    plain = build_case(CASES[name])
    with parameter_places.without_values():
        empty = build_case(CASES[name])
    shapes, wanted = (
        {key: (tensor.shape, tensor.dtype) for key, tensor in generator.state_dict().items()}
        for generator in (empty, plain)
    )
    assert list(shapes.items()) == list(wanted.items())
    assert all(parameter.is_meta and parameter.requires_grad for parameter in empty.parameters())
    for mine, theirs in zip(empty.stages(), plain.stages(), strict=True):
        assert mine.name == theirs.name
        assert [key for key, _ in mine.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    assert nn.Linear(1, 1).weight.device.type == "cpu"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1024, 1024)
        self.second = nn.Linear(1024, 1024)
        self.second.weight = self.first.weight
        nn.init.ones_(self.second.weight)


def test_tied_parameters_stay_tied_and_later_values_reach_them(tmp_path: Path) -> None:
    with parameter_places.on_disk(str(tmp_path)):
        tied = Tied()
    assert tied.first.weight is tied.second.weight
    assert bool((tied.first.weight == 1).all())
    assert list(tmp_path.iterdir()) == []
    with parameter_places.without_values():
        tied = Tied()
    assert tied.first.weight is tied.second.weight
    assert tied.first.weight.is_meta


def test_parameters_on_disk_take_no_memory_of_the_process() -> None:
    before = anonymous_bytes()
    with parameter_places.on_disk():
        layers = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8)))
    after = anonymous_bytes()
    assert before is not None
    assert after is not None
    num_bytes = sum(4 * parameter.numel() for parameter in layers.parameters())
    assert after - before < num_bytes / 4
    assert layers[0](torch.ones(2048)).isfinite().all()
