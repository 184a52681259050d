"""Every stage of every method, small, with batches for it: what parallel strategies are compared on.

The networks are perceptrons of 38 values around a common start; each is the end of a straight trajectory from there.
A task asks for the sign of one of six features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.config import merge_config
from raywgen.generators import DataSpec, Stage, method
from raywgen.generators.bundle import build_generator
from raywgen.tasks import build_network
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer, NormalizerTable, WeightBatch

NUM_TARGETS = 2
_WIDTHS = [6, 4, 2]
_DATA = DataSpec(num_features=6, max_classes=2, policies=("adam", "sgd"))
_NUM_NETWORKS = 40
_SUPPORT, _QUERY = 8, 16

_OPTIMIZER = {"learning_rate": 1e-3, "warmup_steps": 0, "weight_decay": 0.01, "grad_clip": 1e9}
_STAGE: dict[str, Any] = {"num_steps": 30, "optimizer": _OPTIMIZER}
_NETWORK = {"width": 16, "num_layers": 1, "num_heads": 2, "chunk_length": 8}
_WINDOWS = _NETWORK | {"kind": "chunks", "window": 2}
_TOKENIZER = _STAGE | {"chunk_length": 8, "quantiser": {"num_levels": 2, "num_codes": 8}, "width": 16}
_IGPG = {
    "tokenizer": _TOKENIZER,
    "prior": _STAGE | {"width": 16, "num_layers": 2, "num_heads": 2},
    # Neither of the two is a mean over networks: one is of a quarter of the part of a worker, one between networks.
    "task_loss": _STAGE | {"nll_weight": 0.0, "diversity_weight": 0.0, "temperature": 0.0},
}
_IGPG_WINDOWS = {"tokenizer": _TOKENIZER | {"window": 2}}
_IGPG_SCALES = {"tokenizer": _TOKENIZER | {"window": 2, "scales": "filter"}}
# Reptile's gradient is a difference of parameters: the longer its inner steps, the fewer digits are lost.
_REPTILE = _STAGE | {"inner_rate": 0.2}
_MCDI = {"diffusion": {"num_targets": NUM_TARGETS}, "network": _NETWORK, "denoiser": _REPTILE, "task_loss": _STAGE}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One stage of a generator.

    Attributes:
        method: Name of the method.
        stage: Name of the stage.
        settings: Those of the generator.
        frozen: Parts of the stage that are kept as they are, such as codebooks whose arg-min might flip by rounding.
        loss: The metric that is compared. Reptile's own loss is an inner product that has a gradient for its only
            meaning, and in which nearly all digits cancel; the loss that its inner steps lower stands for it.
    """

    method: str
    stage: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    loss: str = "loss"


CASES = {
    "igpg-tokenizer": Case(method="igpg", stage="tokenizer", settings=_IGPG, frozen=("tokenizer.quantiser",)),
    "igpg-tokenizer-live": Case(method="igpg", stage="tokenizer", settings=_IGPG),
    "igpg-tokenizer-ragged": Case(
        method="igpg", stage="tokenizer", settings=_IGPG | _IGPG_WINDOWS, frozen=("tokenizer.quantiser",)
    ),
    "igpg-tokenizer-scales": Case(
        method="igpg", stage="tokenizer", settings=_IGPG | _IGPG_SCALES, frozen=("tokenizer.quantiser",)
    ),
    "igpg-prior": Case(method="igpg", stage="prior", settings=_IGPG),
    "igpg-prior-alone": Case(
        method="igpg", stage="prior", settings=_IGPG | {"prior": _IGPG["prior"] | {"independent_share": 0.5}}
    ),
    "igpg-task-loss": Case(method="igpg", stage="task_loss", settings=_IGPG),
    "mcdi-reptile": Case(method="mcdi", stage="denoiser", settings=_MCDI, loss="consistency"),
    "mcdi-joint": Case(method="mcdi", stage="denoiser", settings=_MCDI | {"denoiser": _STAGE | {"meta": "joint"}}),
    "mcdi-windows": Case(
        method="mcdi",
        stage="denoiser",
        settings=_MCDI | {"network": _WINDOWS, "denoiser": _STAGE | {"meta": "joint"}},
    ),
    "mcdi-reptile-windows": Case(
        method="mcdi", stage="denoiser", settings=_MCDI | {"network": _WINDOWS}, loss="consistency"
    ),
    "mcdi-task-loss": Case(method="mcdi", stage="task_loss", settings=_MCDI),
    "lohp-policy": Case(
        method="lohp",
        stage="policy",
        settings={
            "path": {"num_steps": 4, "length": 2},
            "sampling": {"num_steps": 2},
            "network": _NETWORK | {"kind": "chunks"},
            "policy": _STAGE | {"replay_size": 2},
        },
    ),
    "lohp-windows": Case(
        method="lohp",
        stage="policy",
        settings={
            "path": {"num_steps": 4, "length": 2},
            "sampling": {"num_steps": 2},
            "network": _WINDOWS,
            "policy": _STAGE | {"replay_size": 2},
        },
    ),
    "direct-regression": Case(
        method="direct", stage="regression", settings={"network": _NETWORK, "regression": _STAGE, "task_loss": _STAGE}
    ),
    "direct-task-loss": Case(
        method="direct", stage="task_loss", settings={"network": _NETWORK, "regression": _STAGE, "task_loss": _STAGE}
    ),
    "hypernetwork-task-loss": Case(
        method="hypernetwork", stage="task_loss", settings={"width": 16, "task_loss": _STAGE}
    ),
}


def build_stage(case: Case, batch_size: int, optimizer: Mapping[str, Any] | None = None) -> Stage:
    """Builds the stage of a case, the same every time, its data-dependent parts prepared.

    Args:
        case: Which one.
        batch_size: Networks of a batch of all workers.
        optimizer: Settings of the stage's optimiser in place of the case's.
    """
    generator = build_generator(case.method, _config(case, batch_size, optimizer), _normalizers(), _DATA, seed=0)
    stages = {stage.name: stage for stage in generator.stages()}
    for stage in stages.values():
        stage.setup([batch_of(case, step, batch_size) for step in range(3)], seed=0)
        if stage.name == case.stage:
            break
    for name in case.frozen:
        part: Any = stages[case.stage].get_submodule(name)
        part.update = lambda all_reduce: None
    return stages[case.stage]


def batch_of(case: Case, step: int, batch_size: int, rank: int = 0, num_workers: int = 1) -> WeightBatch:
    """Returns a worker's part of the batch of a step: every `num_workers`-th network of it."""
    generator = torch.Generator().manual_seed(step)
    place_B = torch.arange(batch_size)
    condition, query = (_samples(place_B, num, generator) for num in (_SUPPORT, _QUERY))
    values_BD = _values()[(step * batch_size + place_B) % _NUM_NETWORKS]
    shares_k1 = torch.arange(1, NUM_TARGETS + 1).unsqueeze(1) / NUM_TARGETS
    start_D = _start()
    num_targets = 1 if case.method == "direct" else NUM_TARGETS
    whole = WeightBatch(
        values_BD=values_BD,
        layout=_layout(),
        module=_network(),
        condition=condition,
        query=query,
        sample_index_B=step * batch_size + place_B,
        targets_BAD=(start_D + (values_BD - start_D).unsqueeze(1) * shares_k1)[:, -num_targets:],
    )
    return whole.take(place_B[rank::num_workers])


def noise_of(batch: WeightBatch) -> KeyedNoise:
    """Returns the noise of a part of a batch, which does not depend on how the batch is parted."""
    return KeyedNoise(0, batch.sample_index_B, 2_000)


def _config(case: Case, batch_size: int, optimizer: Mapping[str, Any] | None) -> Any:
    settings = {name: dict(group) if isinstance(group, Mapping) else group for name, group in case.settings.items()}
    stage = settings[case.stage]
    stage |= {"batch_size": batch_size, "optimizer": {**stage["optimizer"], **(optimizer or {})}}
    return merge_config(method(case.method).Config, [(case.method, settings)])


@cache
def _network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_network({"name": "mlp", "widths": _WIDTHS})


@cache
def _layout() -> Layout:
    return Layout.from_state_dict(_network().state_dict())


@cache
def _start() -> Tensor:
    return _layout().flatten(_network().state_dict())


@cache
def _values() -> Tensor:
    """All networks, `(N, D)`: around the start, in three directions and a little noise."""
    generator = torch.Generator().manual_seed(1)
    directions_3D = torch.randn(3, len(_start()), generator=generator)
    offset_N3 = torch.randn(_NUM_NETWORKS, 3, generator=generator)
    noise_ND = torch.randn(_NUM_NETWORKS, len(_start()), generator=generator)
    return _start() + 0.2 * offset_N3 @ directions_3D + 0.02 * noise_ND


@cache
def _normalizers() -> NormalizerTable:
    return {_layout().id: (_layout(), Normalizer.measure(_layout(), _values(), _start()))}


def _samples(place_B: Tensor, num: int, generator: torch.Generator) -> Condition:
    F = _DATA.num_features
    samples_BSF = torch.randn(len(place_B), num, F, generator=generator)
    features = [int(place) % F for place in place_B]
    return Condition(
        instructions=tuple(f"Is feature {feature} above zero?" for feature in features),
        samples_BSF=samples_BSF,
        labels_BS=torch.stack([(samples_BSF[row, :, f] > 0).long() for row, f in enumerate(features)]),
        policies=tuple(_DATA.policies[int(place) % 2] for place in place_B),
    )
