"""Compares fitting many networks with a plain PyTorch loop that fits one network after another.

Both get the same batches and one thread. Weights are compared after 20 steps before anything is timed.

Shape letters beyond the legend in `raywgen.weights`: T samples of a minibatch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.tasks import FitConfig, FitData, Recorded, SAMConfig, build_network, build_task, fit
from raywgen.tasks.train_loop import EXECUTIONS, Execution
from raywgen.training.session import ray_session
from raywgen.zoo.plan import initial_state

_AGREE = 1e-4
_CHECKED_STEPS = 20


@dataclass(kw_only=True)
class ZooFitConfig:
    """The networks to fit, and how fitting is measured.

    Attributes:
        num_steps: Steps of a measurement.
        rounds: Alternating pairs; figures are medians of ratios.
        num_cnns: Networks of 2,464 values.
        data: A Parquet file with 28 x 28 images for them; by default scikit-learn's digits, enlarged.
        networks_per_actor: Networks of 2,464 values that an actor fits.
    """

    num_steps: int = 100
    rounds: int = 5
    num_cnns: int = 8
    data: str = ""
    networks_per_actor: int = 8


@dataclass(frozen=True, kw_only=True)
class _Case:
    network: dict[str, Any]
    num: int
    data: FitData
    batch_size: int
    sam: SAMConfig = field(default_factory=SAMConfig)

    def config(self, num_steps: int) -> FitConfig:
        """Returns the config by which both sides fit."""
        return FitConfig(
            learning_rate=1e-3, num_steps=num_steps, batch_size=self.batch_size, loss="plain", sam=self.sam
        )


def measure(config: ZooFitConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Compares weights, then measures both sides in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    conditions: dict[str, Any] = {"cores": os.cpu_count(), "num_steps": config.num_steps, "rounds": config.rounds}
    for name, case in _cases(config).items():
        gaps = {execution: _gap(case, execution) for execution in EXECUTIONS}
        assert max(gaps.values()) < _AGREE, f"{name}: weights differ from the plain loop's by {gaps}"
        seconds: dict[Execution, float] = {
            execution: _seconds(lambda execution=execution, case=case: _ours(case, execution, 4))
            for execution in EXECUTIONS
        }
        execution = min(seconds, key=lambda execution: seconds[execution])
        pairs = [
            (
                _seconds(lambda case=case: _plain(case, config.num_steps)),
                _seconds(lambda case=case, execution=execution: _ours(case, execution, config.num_steps)),
            )
            for _ in range(config.rounds)
        ]
        ratios = [plain / ours for plain, ours in pairs]
        figures[f"speedup_{name}"] = round(median(ratios), 3)
        per_step = 1e3 / case.num / config.num_steps
        conditions[name] = {
            "execution": execution,
            "networks": case.num,
            "plain_ms": round(median(plain for plain, _ in pairs) * per_step, 3),
            "ours_ms": round(median(ours for _, ours in pairs) * per_step, 3),
            "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            "relative_difference": max(gaps.values()),
        }
    torch.set_num_threads(threads)
    figures["efficiency_2_actors"] = round(_efficiency(config), 3)
    return figures, conditions


def _cases(config: ZooFitConfig) -> dict[str, _Case]:
    digits = build_task({"name": "images", "path": "digits"})
    flat = FitData(x=digits.train_x_SF, labels_NS=digits.train_y_S)
    mlp = {"name": "mlp", "widths": [64, 32, 10]}
    return {
        "cnn": _Case(network={"name": "tiny-cnn"}, num=config.num_cnns, data=_images(config.data), batch_size=64),
        "mlp": _Case(network=mlp, num=64, data=flat, batch_size=32),
        "head": _Case(
            network={"name": "mlp", "widths": [64, 5]},
            num=256,
            data=FitData(x=digits.train_x_SF, labels_NS=digits.train_y_S % 5),
            batch_size=32,
        ),
        "sam": _Case(network=mlp, num=64, data=flat, batch_size=32, sam=SAMConfig(rho=0.05)),
    }


def _images(path: str) -> FitData:
    if path:
        task = build_task({"name": "images", "path": path, "limit": 2000})
        return FitData(x=task.train_x_SF, labels_NS=task.train_y_S)
    task = build_task({"name": "images", "path": "digits"})
    images_SCHW = task.train_x_SF.view(-1, 1, 8, 8)
    large = nn.functional.interpolate(images_SCHW, size=(28, 28), mode="bilinear", align_corners=False)
    return FitData(x=large.flatten(1), labels_NS=task.train_y_S)


def _start(case: _Case) -> Recorded:
    states = [initial_state(case.network, seed) for seed in range(case.num)]
    return Recorded(step=0, state_N={name: torch.stack([state[name] for state in states]) for name in states[0]})


def _ours(case: _Case, execution: Execution, num_steps: int) -> dict[str, Tensor]:
    (end,) = fit(
        build_network(case.network),
        _start(case),
        case.data,
        case.config(num_steps),
        order_seeds=range(case.num),
        record_steps=[num_steps],
        execution=execution,
    )
    return end.state_N


def _plain(case: _Case, num_steps: int) -> dict[str, Tensor]:
    """Fits by the loop that anybody would write."""
    start = _start(case)
    x_SF, labels_S = case.data.x, case.data.labels_NS
    ends = []
    for seed in range(case.num):
        module = build_network(case.network)
        module.load_state_dict({name: tensor[seed] for name, tensor in start.state_N.items()})
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(seed)
        batches: list[Tensor] = []
        for _ in range(num_steps):
            if not batches:
                order = torch.randperm(len(labels_S), generator=generator)
                batches = [part for part in order.split(case.batch_size) if len(part) == case.batch_size]
            index_T = batches.pop(0)
            _plain_step(module, optimizer, x_SF[index_T], labels_S[index_T], case.sam.rho)
        ends.append(module.state_dict())
    return {name: torch.stack([end[name] for end in ends]) for name in ends[0]}


def _plain_step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, rho: float) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(x), labels).backward()
    if rho:
        parameters = list(module.parameters())
        gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            kept = [parameter.clone() for parameter in parameters]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += rho * gradient / norm
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), labels).backward()
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)
    optimizer.step()


def _gap(case: _Case, execution: Execution) -> float:
    """Returns the largest distance of a network from the plain loop's, over its norm."""
    ours, plain = _ours(case, execution, _CHECKED_STEPS), _plain(case, _CHECKED_STEPS)
    apart = sum((ours[name] - tensor).flatten(1).square().sum(dim=1) for name, tensor in plain.items())
    size = sum(tensor.flatten(1).square().sum(dim=1) for tensor in plain.values())
    assert isinstance(apart, Tensor)
    assert isinstance(size, Tensor)
    return float((apart / size).sqrt().max())


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class _Actor:
    """Fits tiny CNNs on a thread of its own."""

    def __init__(self, config: ZooFitConfig) -> None:
        torch.set_num_threads(1)
        case = _cases(config)["cnn"]
        self._case = _Case(
            network=case.network, num=config.networks_per_actor, data=case.data, batch_size=case.batch_size
        )
        self._num_steps = config.num_steps
        _ours(self._case, "sequential", 4)

    def work(self) -> float:
        """Fits and returns the seconds it took."""
        return _seconds(lambda: _ours(self._case, "sequential", self._num_steps))


def _efficiency(config: ZooFitConfig) -> float:
    """Returns the networks per second of two actors, over twice those of one."""
    import ray

    with ray_session():
        kind: Any = ray.remote(num_cpus=1)(_Actor)
        actors = [kind.remote(config) for _ in range(2)]
        ray.get([actor.work.remote() for actor in actors])
        ratios = []
        for _ in range(config.rounds):
            alone = _seconds(lambda: ray.get(actors[0].work.remote()))
            both = _seconds(lambda: ray.get([actor.work.remote() for actor in actors]))
            ratios.append(alone / both)
    return median(ratios)
