"""Small generators of every method, with batches for them: what two devices are compared on.

A network is a perceptron with batch normalisation, or a linear layer, around a common start. A task asks for the sign
of one of six features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raywgen.config import merge_config
from raywgen.generators import DataSpec, Generator, method
from raywgen.generators.bundle import build_generator
from raywgen.weights import Condition, Layout, Normalizer, WeightBatch

DATA = DataSpec(num_features=6, max_classes=2, policies=("adam", "sgd"))
BATCH_SIZE = 8
_NUM_NETWORKS = 24
_NUM_SAMPLES = 12

_STAGE: dict[str, Any] = {"num_steps": 3, "batch_size": BATCH_SIZE}
_OFF: dict[str, Any] = {"num_steps": 0}
_NETWORK = {"width": 16, "num_layers": 1, "num_heads": 2, "chunk_length": 8}
_TOKENIZER = _STAGE | {"chunk_length": 12, "width": 16, "quantiser": {"num_levels": 2, "num_codes": 8}}
_PRIOR = _STAGE | {"width": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0}
_IGPG = {"tokenizer": _TOKENIZER, "prior": _PRIOR, "task_loss": _STAGE}
_MCDI = {
    "diffusion": {"num_targets": 2, "num_steps": 6},
    "sampling": {"num_steps": 6},
    "network": _NETWORK,
    "denoiser": _STAGE,
    "task_loss": _STAGE,
}
_LOHP = {
    "path": {"num_steps": 4, "length": 2},
    "sampling": {"num_steps": 4},
    "network": _NETWORK,
    "policy": _STAGE | {"replay_size": 2},
}
_DIRECT = {"network": _NETWORK, "regression": _STAGE, "task_loss": _STAGE}


def _igpg(
    tokenizer: Mapping[str, Any] | None = None,
    prior: Mapping[str, Any] | None = None,
    task_loss: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    given = {"tokenizer": tokenizer, "prior": prior, "task_loss": task_loss}
    return {name: _IGPG[name] | (settings or {}) for name, settings in given.items()} | {"sampling": sampling or {}}


def _quantiser(kind: str, **settings: Any) -> dict[str, Any]:
    return {"quantiser": {"kind": kind, "num_levels": 2, "num_codes": 8} | settings}


@dataclass(frozen=True, kw_only=True)
class DeviceCase:
    """One generator.

    Attributes:
        method: Name of the method.
        settings: Those of the generator.
        target: The networks that it learns from.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: Literal["perceptron", "linear"] = "perceptron"


CASES = {
    "igpg": DeviceCase(method="igpg", settings=_igpg()),
    "igpg-gumbel": DeviceCase(method="igpg", settings=_igpg(_quantiser("gumbel"))),
    "igpg-finite-scalar": DeviceCase(
        method="igpg", settings=_igpg(_quantiser("finite_scalar", num_codes=16) | {"chunk_length": 8})
    ),
    "igpg-beam": DeviceCase(
        method="igpg", settings=_igpg({"quantiser": {"num_levels": 2, "num_codes": 8, "beam": 2, "revive_below": 0.5}})
    ),
    "igpg-scales": DeviceCase(
        method="igpg", settings=_igpg({"scales": "filter"}, {"window": 4}, sampling={"windows": "parallel"})
    ),
    "igpg-windows": DeviceCase(
        method="igpg",
        settings=_igpg(
            {"window": 2, "coder": "conv"},
            {"window": 2, "num_kv_heads": 1, "condition_dropout": 0.5},
            {"windows": "parallel", "statistics": "batch", "nll_weight": 1.0, "diversity_weight": 1.0},
            {"guidance": 2.0, "top_k": 4, "top_p": 0.9},
        ),
    ),
    "igpg-blocks": DeviceCase(
        method="igpg",
        settings=_igpg(
            {"coder": "transformer", "context": 2, "output_loss_weight": 1.0},
            {"independent_share": 0.5},
            {"l2_anchor_weight": 1.0},
            {"chunks": "independent", "decoding": "tokens", "num_averaged": 2},
        ),
    ),
    "mcdi": DeviceCase(method="mcdi", settings=_MCDI),
    "mcdi-heads": DeviceCase(method="mcdi", settings=_MCDI, target="linear"),
    "mcdi-latents": DeviceCase(
        method="mcdi",
        settings=_MCDI
        | {
            "network": _NETWORK | {"kind": "latents"},
            "tokenizer": _TOKENIZER,
            "denoiser": _STAGE | {"meta": "joint"},
            "diffusion": {"num_targets": 2, "num_steps": 6, "parameterisation": "noise", "targets": "naive"},
            "sampling": {"sampler": "stochastic", "num_steps": 4},
        },
    ),
    "mcdi-chunks": DeviceCase(
        method="mcdi",
        settings=_MCDI
        | {"network": _NETWORK | {"kind": "chunks"}, "sampling": {"sampler": "deterministic", "num_steps": 4}},
    ),
    "mcdi-windows": DeviceCase(
        method="mcdi", settings=_MCDI | {"network": _NETWORK | {"kind": "chunks", "window": 2}, "task_loss": _OFF}
    ),
    "mcdi-latent-windows": DeviceCase(
        method="mcdi",
        settings=_MCDI
        | {
            "network": _NETWORK | {"kind": "latents", "window": 2},
            "tokenizer": _TOKENIZER | {"window": 2},
            "task_loss": _OFF,
        },
    ),
    "units": DeviceCase(method="units", settings={"width": 16, "task_loss": _STAGE}),
    "lohp": DeviceCase(method="lohp", settings=_LOHP),
    "lohp-chunks": DeviceCase(
        method="lohp",
        settings=_LOHP
        | {
            "network": _NETWORK | {"kind": "chunks"},
            "policy": _STAGE
            | {"replay_size": 2, "objective": "detailed", "backward": "learned", "flow": "joint", "task_reward": 1.0},
        },
    ),
    "lohp-windows": DeviceCase(method="lohp", settings=_LOHP | {"network": _NETWORK | {"kind": "chunks", "window": 2}}),
    "lohp-heads": DeviceCase(method="lohp", settings=_LOHP, target="linear"),
    "direct": DeviceCase(method="direct", settings=_DIRECT),
    "direct-windows": DeviceCase(
        method="direct", settings=_DIRECT | {"network": _NETWORK | {"kind": "chunks", "window": 2}, "task_loss": _OFF}
    ),
    "direct-heads": DeviceCase(method="direct", settings=_DIRECT, target="linear"),
    "hypernetwork": DeviceCase(method="hypernetwork", settings={"width": 16, "task_loss": _STAGE}),
}


def build_case(case: DeviceCase) -> Generator:
    """Builds the generator of a case, on the CPU and the same every time."""
    config = merge_config(method(case.method).Config, [(case.method, dict(case.settings))])
    layout, module = target(case.target)
    start_D = layout.flatten(module.state_dict())
    normalizers = {layout.id: (layout, Normalizer.measure(layout, _values(case.target), start_D))}
    return build_generator(case.method, config, normalizers, DATA, seed=0)


def batch_of(case: DeviceCase, step: int, num_targets: int) -> WeightBatch:
    """Returns the batch of a step, on the CPU."""
    layout, module = target(case.target)
    place_B = torch.arange(BATCH_SIZE) + step * BATCH_SIZE
    values_BD = _values(case.target)[place_B % _NUM_NETWORKS]
    start_D = layout.flatten(module.state_dict())
    shares_A1 = torch.arange(1, num_targets + 1).unsqueeze(1) / max(1, num_targets)
    return WeightBatch(
        values_BD=values_BD,
        layout=layout,
        module=module,
        condition=condition_of(BATCH_SIZE, 2 * step),
        query=condition_of(BATCH_SIZE, 2 * step + 1),
        sample_index_B=place_B,
        targets_BAD=start_D + (values_BD - start_D).unsqueeze(1) * shares_A1 if num_targets else None,
    )


def condition_of(num: int, seed: int) -> Condition:
    """Returns B conditions, on the CPU; the one at place b asks for feature b, modulo six."""
    generator = torch.Generator().manual_seed(seed)
    samples_BSF = torch.randn(num, _NUM_SAMPLES, DATA.num_features, generator=generator)
    features = [place % DATA.num_features for place in range(num)]
    return Condition(
        instructions=tuple(f"Is feature {feature} above zero?" for feature in features),
        samples_BSF=samples_BSF,
        labels_BS=torch.stack([(samples_BSF[row, :, f] > 0).long() for row, f in enumerate(features)]),
        policies=tuple(DATA.policies[place % 2] for place in range(num)),
    )


@cache
def target(kind: str) -> tuple[Layout, nn.Module]:
    """Returns the layout of a kind of networks, and one of them."""
    F, C = DATA.num_features, DATA.max_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        perceptron = nn.Sequential(nn.Linear(F, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, C))
        module = perceptron if kind == "perceptron" else nn.Linear(F, C)
    return Layout.from_state_dict(module.state_dict()), module.eval()


@cache
def _values(kind: str) -> Tensor:
    """All networks of a kind, `(N, D)`."""
    layout, module = target(kind)
    generator = torch.Generator().manual_seed(1)
    return layout.flatten(module.state_dict()) + 0.2 * torch.rand(_NUM_NETWORKS, layout.num_values, generator=generator)
