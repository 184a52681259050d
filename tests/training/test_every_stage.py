"""Every stage of every method under ZeRO-3, and what modules return, which its hooks must see."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import raywgen.generators
import raywgen.nn
from raywgen.benchmarks.strategy_cases import CASES, Case, batch_of, build_stage, noise_of
from raywgen.training.engine import DeepSpeedEngine, Engine, EngineSettings, LocalEngine
from tests.training.engine_states import parameters_of

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH_SIZE = 6


def modules() -> Iterator[type[nn.Module]]:
    for package in (raywgen.nn, raywgen.generators):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for _, found in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
                if issubclass(found, nn.Module) and found.__module__ == info.name and "forward" in vars(found):
                    yield found


def is_seen(returned: Any) -> bool:
    """Whether DeepSpeed finds all tensors in what has this type: those of tuples, lists and dicts."""
    if get_origin(returned) is UnionType:
        return all(is_seen(part) for part in get_args(returned))
    if returned in (Tensor, NoneType):
        return True
    if inspect.isclass(returned) and issubclass(returned, tuple):
        return all(is_seen(part) for part in get_type_hints(returned).values())
    return get_origin(returned) in (tuple, list, dict) and all(is_seen(part) for part in get_args(returned)[-1:])


def test_modules_return_tensors_tuples_and_dicts_alone() -> None:
    found = list(modules())
    assert len(found) > 30
    for module in found:
        returned = get_type_hints(module.forward)["return"]
        assert is_seen(returned), f"{module.__module__}.{module.__name__}.forward returns {returned}"


def losses(engine: Engine, case: Case, num_steps: int) -> list[float]:
    taken = []
    for step in range(num_steps):
        batch = batch_of(case, step, BATCH_SIZE)
        taken.append(float(engine.train_step(batch, noise_of(batch), 1e-2)["loss"]))
    return taken


def judged(engine: Engine, case: Case) -> float:
    batch = batch_of(case, 3, BATCH_SIZE)
    return float(engine.evaluate(batch, noise_of(batch))["loss"])


@pytest.mark.parametrize("name", CASES)
def test_a_batch_in_parts_of_any_size_gives_the_same_losses(name: str) -> None:
    """As over several workers: a loss must be a mean over networks, whatever part of each a stage sees."""
    case = CASES[name]
    whole, parts = (
        losses(LocalEngine(build_stage(case, BATCH_SIZE), EngineSettings(accumulate=num)), case, 2) for num in (1, 4)
    )
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_stage_of_an_odd_number_of_values_is_sharded(zero_stage: int) -> None:
    case = CASES["lohp-policy"]
    stage = build_stage(case, BATCH_SIZE)
    assert sum(parameter.numel() for parameter in stage.parameters()) % 2
    sharded = DeepSpeedEngine(stage, 1, EngineSettings(zero_stage=zero_stage, min_sharded=0))
    assert losses(sharded, case, 1) == pytest.approx(losses(LocalEngine(build_stage(case, BATCH_SIZE)), case, 1))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", CASES)
def test_every_stage_trains_with_all_its_parameters_sharded(name: str) -> None:
    case = CASES[name]
    local = LocalEngine(build_stage(case, BATCH_SIZE))
    sharded = DeepSpeedEngine(build_stage(case, BATCH_SIZE), 1, EngineSettings(zero_stage=3, min_sharded=0))
    assert losses(sharded, case, 3) == pytest.approx(losses(local, case, 3), rel=1e-5)
    assert not any(parameter.numel() for parameter in sharded.stage.parameters())
    assert judged(sharded, case) == pytest.approx(judged(local, case), rel=1e-4)
    theirs = parameters_of(local)
    for key, tensor in parameters_of(sharded).items():
        torch.testing.assert_close(
            tensor, theirs[key], rtol=1e-3, atol=1e-5, msg=lambda message, key=key: key + message
        )
