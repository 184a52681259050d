"""IGPG's prior on the tokens of a few published networks: trained in windows, then asked to write each again.

Nothing but the layout is known outside the tokens: values are divided by what the layout alone says of their scale.

Shape legend: M chunks, K values of a chunk, L levels, N windows of a step, W chunks of a window, G place features,
D values of a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from raywgen.benchmarks.pretrained_networks import Images, Pretrained
from raywgen.benchmarks.recipes import folder_of
from raywgen.generators.igpg import PriorConfig, SamplingConfig
from raywgen.generators.igpg.prior import Prior
from raywgen.generators.igpg.windows import random_windows
from raywgen.generators.interface import DataSpec
from raywgen.nn.quantisers import ResidualConfig, ResidualQuantiser
from raywgen.weights import Condition, KeyedNoise, layout_reference
from raywgen.weights.chunks import from_chunks, place_features, to_chunks
from raywgen.weights.files import load_state_dict, save_state_dict

_SAMPLE_SIZE = 8
OnProgress = Callable[[int, int], None]


@dataclass(kw_only=True)
class TokenPriorConfig:
    """Tokens of the prior, and how it is trained.

    Attributes:
        chunk_length: K, values of a chunk.
        tokens: Residual levels of a chunk.
        prior: Its sizes and training; `batch_size` is that of windows, and `window` bounds what is seen at once.
        num_samples: Labelled images it is told.
    """

    chunk_length: int = 16
    tokens: ResidualConfig = field(default_factory=lambda: ResidualConfig(num_levels=4, num_codes=256))
    prior: PriorConfig = field(
        default_factory=lambda: PriorConfig(num_steps=300, batch_size=16, learning_rate=3e-3, width=128, window=64)
    )
    num_samples: int = 20

    def __post_init__(self) -> None:
        if self.prior.window < 1 or self.prior.num_steps < 1 or min(self.chunk_length, self.num_samples) < 1:
            raise ValueError("prior.window, prior.num_steps, chunk_length and num_samples must be at least 1")

    @property
    def bits_per_value(self) -> float:
        """Of the tokens."""
        return self.tokens.num_levels * math.log2(self.tokens.num_codes) / self.chunk_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One network that the prior wrote.

    Attributes:
        values_D: Flat vector.
        agreement: Share of tokens equal to the stored network's.
        distance: Norm of the difference to the stored network over that network's, in units of the layout's scales.
        nats_per_token: Mean negative log-probability of the stored network's tokens.
    """

    values_D: Tensor
    agreement: float
    distance: float
    nats_per_token: float


class TokenPrior:
    """Tokeniser and prior of a few networks.

    Args:
        config: Sizes.
        networks: What is learned.
        images: From which the labelled samples of the condition are taken.
        seed: Of everything.
    """

    def __init__(self, config: TokenPriorConfig, networks: list[Pretrained], images: Images, seed: int) -> None:
        self.config, self.networks, self.seed = config, networks, seed
        x_SCHW = images.first(config.num_samples).x_SCHW.mean(dim=1, keepdim=True)
        self._samples_SF = avg_pool2d(x_SCHW, max(1, x_SCHW.shape[-1] // _SAMPLE_SIZE)).flatten(1)
        self._labels_S = images.first(config.num_samples).y_S
        self.quantiser = ResidualQuantiser.from_config(config.tokens, config.chunk_length)
        chunks = [self._chunks(network) for network in networks]
        self.quantiser.initialise(torch.cat(chunks), 10, torch.Generator().manual_seed(seed))
        self.quantiser.eval()
        self._codes = {
            network.name: self.quantiser.encode(chunks_MK) for network, chunks_MK in zip(networks, chunks, strict=True)
        }
        torch.manual_seed(seed)
        max_classes = max(int(self._labels_S.max()) + 1, 2)
        data = DataSpec(num_features=self._samples_SF.shape[1], max_classes=max_classes)
        sizes = config.tokens
        self.prior = Prior(config.prior, sizes.num_levels, sizes.num_codes, config.chunk_length, data)

    @property
    def num_values(self) -> dict[str, int]:
        """Numbers held by the codebooks and by the prior, and tokens of all networks."""
        return {
            "prior_codebook_values": self.quantiser.num_codebook_values,
            "prior_values": sum(parameter.numel() for parameter in self.prior.parameters()),
            "prior_tokens": sum(codes_ML.numel() for codes_ML in self._codes.values()),
        }

    def train_or_load(self, root: str, update: OnProgress) -> bool:
        """Trains, unless a prior of the same recipe, code and networks is kept; whether it trained."""
        told = {network.name: float(self._values(network).double().square().sum()) for network in self.networks}
        recipe = {**asdict(self.config), "networks": told, "seed": self.seed}
        kept = Path(folder_of(root, "pretrained-prior", recipe)) / "prior.safetensors"
        if kept.is_file():
            self.prior.load_state_dict(load_state_dict(kept))
            return False
        self._train(update)
        save_state_dict(self.prior.state_dict(), kept, {})
        return True

    @torch.no_grad()
    def reconstruct(self, network: Pretrained) -> Tensor:
        """What the stored tokens hold of a network, a flat vector `(D,)`: the most that writing can reach."""
        return self._decode(network, self._codes[network.name])

    @torch.no_grad()
    def write(self, network: Pretrained) -> Written:
        """The likeliest tokens, all windows at once, told the network's facts; nothing stored is seen."""
        self.prior.eval()
        sampling = SamplingConfig(decoding="tokens", windows="parallel", max_rows=256)
        noise = KeyedNoise(self.seed, torch.zeros(1, dtype=torch.int64))
        rollout = self.prior.rollout(
            self._condition(network), self._places(network), self.quantiser, noise, 0.0, sampling
        )
        stored_ML = self._codes[network.name]
        values_D = self._decode(network, rollout.codes_BML[0])
        likelihood_BM = self.prior.log_likelihood(
            stored_ML.unsqueeze(0), self._condition(network), self._places(network), self.quantiser, sampling
        )
        return Written(
            values_D=values_D,
            agreement=float((rollout.codes_BML[0] == stored_ML).double().mean()),
            distance=self.distance(network, values_D),
            nats_per_token=-float(likelihood_BM.double().sum()) / stored_ML.numel(),
        )

    def distance(self, network: Pretrained, values_D: Tensor) -> float:
        """Relative distance to the stored network, running statistics left out."""
        reference, layout = layout_reference(network.layout), network.layout
        is_weight_D = torch.cat(
            [torch.full((spec.num_values,), "running" not in spec.kind) for spec in layout.generated]
        )
        stored_D = reference.normalise(self._values(network))[is_weight_D]
        return float((reference.normalise(values_D)[is_weight_D] - stored_D).norm() / stored_D.norm())

    def _train(self, update: OnProgress) -> None:
        config, prior = self.config.prior, self.prior.train()
        optimiser = torch.optim.AdamW(prior.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        shares = torch.tensor([float(len(self._codes[network.name])) for network in self.networks])
        drawn = torch.multinomial(
            shares, config.num_steps, replacement=True, generator=torch.Generator().manual_seed(self.seed)
        )
        for step, index in enumerate(drawn.tolist()):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * rate_at(step, config.num_steps, config.warmup_steps)
            loss = self._nll(self.networks[index], step)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), config.grad_clip)
            optimiser.step()
            update(step + 1, config.num_steps)

    def _nll(self, network: Pretrained, step: int) -> Tensor:
        """Nats per token, mean over random windows of one network."""
        config, codes_ML, places_MG = self.config.prior, self._codes[network.name], self._places(network)
        index_N = torch.arange(config.batch_size) + step * config.batch_size
        window = min(config.window, len(codes_ML))
        index_NW = random_windows(KeyedNoise(self.seed, index_N), len(codes_ML), window)
        codes_NWL = codes_ML[index_NW]
        prefix_NTH = self.prior.prefix(self._condition(network), places_MG).expand(config.batch_size, -1, -1)
        hidden_NWH = self.prior.states(prefix_NTH, places_MG[index_NW], self.quantiser.decode(codes_NWL))
        return -self.prior.head.log_likelihood(hidden_NWH, codes_NWL, self.quantiser).mean()

    def _condition(self, network: Pretrained) -> Condition:
        return Condition(
            instructions=(f"{network.name}: a ResNet of depth {network.depth}",),
            samples_BSF=self._samples_SF.unsqueeze(0),
            labels_BS=self._labels_S.unsqueeze(0),
        )

    def _places(self, network: Pretrained) -> Tensor:
        return place_features(network.layout, self.config.chunk_length)

    def _values(self, network: Pretrained) -> Tensor:
        return network.layout.flatten(network.state)

    def _chunks(self, network: Pretrained) -> Tensor:
        normalised_D = layout_reference(network.layout).normalise(self._values(network))
        return to_chunks(normalised_D.unsqueeze(0), self.config.chunk_length)[0]

    def _decode(self, network: Pretrained, codes_ML: Tensor) -> Tensor:
        values_D = from_chunks(self.quantiser.decode(codes_ML), network.layout.num_values)
        return layout_reference(network.layout).denormalise(values_D)


def rate_at(step: int, num_steps: int, warmup_steps: int) -> float:
    """Part of the peak rate: linear warm-up, then a cosine to 0."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def told_of(written: Mapping[str, Written]) -> dict[str, dict[str, float]]:
    """What is reported of each written network beside its accuracy."""
    return {
        name: {
            "agreement": round(one.agreement, 4),
            "distance": round(one.distance, 4),
            "nats_per_token": round(one.nats_per_token, 4),
        }
        for name, one in written.items()
    }
