"""Whether a GPU trains and generates what the CPU does: every stage and every way to draw, of every method.

    loss_diff    largest | l - l_0 | / max(1, | l_0 |) over the steps of all stages
    value_diff   largest difference of a generated value, or of one that is decoded from its code

`loss_diff_METHOD` and `value_diff_METHOD` are those of one method. Neither Ray nor DeepSpeed is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raywgen.benchmarks.device_cases import BATCH_SIZE, CASES, DeviceCase, batch_of, build_case, condition_of, target
from raywgen.generation.best import generate_best
from raywgen.generators import GenerationRequest, Generator
from raywgen.nn.devices import device_text, resolved_device
from raywgen.training.engine import LocalEngine
from raywgen.training.schedule import learning_rate
from raywgen.weights import KeyedNoise

MOST_LOSS_DIFF = 1e-4
MOST_VALUE_DIFF = 1e-3
_NUM_SETUP_BATCHES = 2
_NUM_DRAWN = 3


@dataclass(kw_only=True)
class CudaCheckConfig:
    """The generators that are compared.

    Attributes:
        cases: Names of generators, see `device_cases`; all by default.
        num_steps: Optimiser steps of each stage.
    """

    cases: list[str] = field(default_factory=lambda: list(CASES))
    num_steps: int = 3

    def __post_init__(self) -> None:
        if unknown := set(self.cases) - set(CASES):
            raise ValueError(f"cases={sorted(unknown)}: give some of {', '.join(CASES)}")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The differences of two devices.

    Attributes:
        losses: Relative difference of the losses of each step, by stage.
        values: Largest difference of the values that came out of each path of generation, by its name.
    """

    losses: dict[str, list[float]]
    values: dict[str, float]

    @property
    def loss_diff(self) -> float:
        """The largest difference of a loss."""
        return max((each for losses in self.losses.values() for each in losses), default=0.0)

    @property
    def value_diff(self) -> float:
        """The largest difference of a value."""
        return max(self.values.values(), default=0.0)


def measure(config: CudaCheckConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Compares each generator on this machine's GPU with itself on the CPU.

    Raises:
        DeviceError: There is no GPU.
    """
    device = resolved_device("cuda")
    figures = {"loss_diff": 0.0, "value_diff": 0.0}
    with full_precision():
        for name in config.cases:
            found = compare(CASES[name], device, config.num_steps)
            print(f"{name}: loss_diff {found.loss_diff:.1e}, value_diff {found.value_diff:.1e}", flush=True)
            for key in (CASES[name].method, ""):
                for figure, value in (("loss_diff", found.loss_diff), ("value_diff", found.value_diff)):
                    full = f"{figure}_{key}" if key else figure
                    figures[full] = max(value, figures.get(full, 0.0))
    return figures, {"cases": config.cases, "torch": torch.__version__, "device": device_text(device)}


def compare(case: DeviceCase, device: torch.device, num_steps: int = 3) -> Compared:
    """Trains and draws on both devices; every stage begins on both with the same parameters.

    Args:
        case: The generator.
        device: The device to compare with the CPU.
        num_steps: Optimiser steps of each stage.
    """
    here, there = build_case(case), build_case(case).to(device)
    losses = {}
    for number, stage in enumerate(here.stages()):
        trained = zip(*(_losses(case, each, number, num_steps) for each in (here, there)), strict=True)
        losses[stage.name] = [abs(found - expected) / max(1.0, abs(expected)) for expected, found in trained]
        there.load_state_dict(here.state_dict())
    drawn, expected = _drawn(case, there.eval()), _drawn(case, here.eval())
    return Compared(losses=losses, values={name: _difference(drawn[name], values) for name, values in expected.items()})


def _losses(case: DeviceCase, generator: Generator, number: int, num_steps: int) -> Iterator[float]:
    """Trains a stage on its generator's device, and yields the loss of each step, and of an evaluation at the end."""
    stage, device, num_targets = generator.stages()[number], generator.device, generator.needs.num_targets
    stage.setup([batch_of(case, step, num_targets).to(device) for step in range(_NUM_SETUP_BATCHES)], 0)
    engine = LocalEngine(stage)
    for step in range(num_steps):
        batch = batch_of(case, step, num_targets).to(device)
        noise = KeyedNoise(0, batch.sample_index_B, number)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            yield float(engine.train_step(batch, noise, learning_rate(stage.config, step), BATCH_SIZE)["loss"])
    batch = batch_of(case, num_steps, num_targets).to(device)
    yield float(engine.evaluate(batch, KeyedNoise(1, batch.sample_index_B, number))["loss"])
    engine.finish()


@torch.no_grad()
def _drawn(case: DeviceCase, generator: Generator) -> dict[str, Tensor]:
    """Returns, by the name of the path of generation, what it draws, on the CPU."""
    layout, module = target(case.target)
    condition = condition_of(_NUM_DRAWN, 99)
    noise = KeyedNoise(3, torch.arange(_NUM_DRAWN))
    request = GenerationRequest(
        condition=condition.to(generator.device), layout=layout, noise=noise.to(generator.device)
    )
    generated = generator.generate(request)
    drawn = {"generate": generated.values_BD}
    if generated.log_prob_B is not None:
        drawn["log_prob"] = generated.log_prob_B
    best = generate_best(generator, condition, layout, module, best_of=2, temperature=0.5, seed=0)
    drawn |= {"best": best.values_BD, "best_loss": best.loss_B, "best_logits": best.logits_BSC}
    values_BD = batch_of(case, 0, 0).values_BD.to(generator.device)
    drawn["reconstruct"] = generator.reconstruct(values_BD, layout)
    if (code := generator.weight_code()) is not None:
        drawn |= {"codes": code.encode(values_BD, layout), "real_tokens": code.real_tokens(layout)}
    return {name: values.cpu() for name, values in drawn.items()}


def _difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max())


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in full float32 within this block; by default a GPU rounds their inputs to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
