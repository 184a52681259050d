"""Measures how fast IGPG's tokeniser encodes, quantises and decodes, beside the rate of matrix products.

    encode_share      time that the products of the encoder take at the rate of one square product, over its time
    quantise_share    likewise, the products of vectors with all codebooks, over the time of the greedy search
    beam_share        likewise, the products of all paths of a beam, over the time of its search
    decode_share      likewise, the products of the decoder, over the time from tokens to chunks
    tokens_share      likewise, encoder and greedy search, over the time from the chunks of a window to its tokens, with
                      their positions and masks
    peer_ratio        time of `ResidualVQ` of the package vector-quantize-pytorch over that of the greedy search and
                      the sums of the code vectors, which the peer returns too. The peer is given all vectors at once,
                      or parts that suit its caches, whichever is faster
    peer_ratio_whole  likewise, the peer given all vectors at once

Figures of the sizes `large` begin with `large_`; those of `small` are the defaults of IGPG. Before anything is timed,
the greedy codes must be the peer's, but where two codes are equally near to within the roundings of float32. All take
turns, in CPU seconds of this process. Each figure is the median over rounds of what a round gave.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from raywgen.benchmarks.decode import cpu_seconds
from raywgen.generators.common.tokenizer import Tokenizer, TokenizerConfig
from raywgen.nn.quantisers import QuantiserConfig, ResidualQuantiser
from raywgen.weights import Layout

_SQUARE = 1024
_PEER_DISTANCES = 1 << 18
_VECTORS_OF_A_CODE = 64
_NUM_ITERATIONS = 2
_PEER = "vector-quantize-pytorch"


@dataclass(kw_only=True)
class SizesConfig:
    """The sizes of a tokeniser.

    Attributes:
        chunk_length: Values of a chunk.
        num_levels: Levels of codes.
        num_codes: Codes of a level.
        width: Hidden width of encoder and decoder.
    """

    chunk_length: int = 16
    num_levels: int = 8
    num_codes: int = 256
    width: int = 128

    def __post_init__(self) -> None:
        self.tokenizer()

    def tokenizer(self) -> TokenizerConfig:
        """Returns the settings of a tokeniser of these sizes."""
        quantiser = QuantiserConfig(num_levels=self.num_levels, num_codes=self.num_codes)
        return TokenizerConfig(chunk_length=self.chunk_length, width=self.width, quantiser=quantiser)


@dataclass(kw_only=True)
class TokenizerSpeedConfig:
    """The tokenisers, and what they take in.

    Attributes:
        small: Sizes of the first tokeniser.
        large: Sizes of the second one, for networks of hundreds of millions of values.
        num_values: Values that are encoded at once; `raywgen corpus encode` takes as many.
        beam: Paths of the beam.
        rounds: Rounds of timing; in each of them all take turns.
        repeats: Times that each does its work in a round.
        threads: Threads of torch.
    """

    small: SizesConfig = field(default_factory=SizesConfig)
    large: SizesConfig = field(
        default_factory=lambda: SizesConfig(chunk_length=64, num_levels=4, num_codes=1024, width=512)
    )
    num_values: int = 1 << 18
    beam: int = 8
    rounds: int = 7
    repeats: int = 2
    threads: int = 1

    def __post_init__(self) -> None:
        least = max(self.small.chunk_length, self.large.chunk_length)
        if self.num_values < least:
            raise ValueError(f"num_values={self.num_values}: give at least one chunk of {least}")
        if min(self.rounds, self.repeats, self.threads) < 1 or self.beam < 2:
            raise ValueError("give at least 1 for rounds, repeats and threads, and 2 for beam")


@torch.no_grad()
def measure(config: TokenizerSpeedConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Checks that codes are equal, then times all of them in turns for both sizes."""
    torch.set_num_threads(config.threads)
    figures: dict[str, float] = {}
    rates: dict[str, dict[str, float]] = {}
    for name, sizes, prefix in (("small", config.small, ""), ("large", config.large, "large_")):
        subject = Subject(sizes, config.num_values, config.beam)
        subject.check()
        seconds = _seconds(config, subject.turns())
        rates[name] = {
            work: round(subject.num_values / median(taken)) for work, taken in seconds.items() if work != "square"
        }
        figures |= {f"{prefix}{figure}": value for figure, value in subject.figures(seconds).items()}
        rates[name]["square_gflops"] = round(2 * _SQUARE**3 / median(seconds["square"]) / 1e9, 1)
        print(f"{name}: {rates[name]}", flush=True)
    _print(rates)
    conditions = {
        "values_per_cpu_second": rates,
        "num_values": config.num_values,
        "rounds": config.rounds,
        "threads": config.threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "peer": version(_PEER),
    }
    return {name: round(value, 3) for name, value in figures.items()}, conditions


def _seconds(config: TokenizerSpeedConfig, turns: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """CPU seconds of each turn, one number a round, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for work in turns.values():
        work()
    for _ in range(config.rounds):
        for name, work in turns.items():
            taken = cpu_seconds(lambda work=work: [work() for _ in range(config.repeats)])
            seconds[name].append(taken / config.repeats)
    return seconds


class Subject:
    """A tokeniser whose codebooks are fitted by k-means, the same quantiser with a beam, and the peer's."""

    def __init__(self, sizes: SizesConfig, num_values: int, beam: int) -> None:
        torch.manual_seed(0)
        self.sizes, self.beam = sizes, beam
        self.num_chunks = num_values // sizes.chunk_length
        self.num_values = self.num_chunks * sizes.chunk_length
        self.tokenizer = Tokenizer(sizes.tokenizer()).eval()
        for parameter in self.tokenizer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))  # Untrained coders add nothing.
        quantiser = self.tokenizer.quantiser
        assert isinstance(quantiser, ResidualQuantiser)
        self.greedy = quantiser
        fitting_NK = torch.randn(_VECTORS_OF_A_CODE * sizes.num_codes, sizes.chunk_length)
        self.greedy.initialise(fitting_NK, _NUM_ITERATIONS, torch.Generator().manual_seed(0))
        self.wide = ResidualQuantiser(sizes.num_levels, sizes.num_codes, sizes.chunk_length, beam=beam)
        self.wide.load_state_dict(self.greedy.state_dict())
        self.peer = _peer(self.greedy)
        self.layout = Layout.from_state_dict({"weight": torch.zeros(2, self.num_values)})
        self.windows = self.tokenizer.windows_with(self.layout, torch.arange(self.num_chunks).unsqueeze(0))
        index_1W = self.windows.index_BW
        self.positions = self.tokenizer.positions(self.layout, index_1W)
        self.mask = self.tokenizer.mask(self.layout, index_1W)
        self.chunks = torch.randn(1, self.num_chunks, sizes.chunk_length)
        self.latents = self.tokenizer.latents(self.chunks, self.positions, self.mask)[0]
        self.codes = self.greedy.encode(self.latents, self.mask[0])

    def check(self) -> None:
        """Asserts that the search, in a window as by itself, gives the peer's codes."""
        found_1NL = self.tokenizer.encode_windows(self.chunks, self.layout, self.windows)
        check_codes(self.greedy, self.latents, self.codes, found_1NL[0])
        for whole in (True, False):
            check_codes(self.greedy, self.latents, self.codes, self.peer_codes(whole=whole))

    def peer_codes(self, *, whole: bool) -> Tensor:
        """Returns the peer's codes `(N, L)` of all vectors at once, or of parts."""
        parts = (self.latents,) if whole else self.latents.split(max(1, _PEER_DISTANCES // self.sizes.num_codes))
        return torch.cat([self.peer(part_NK.unsqueeze(0))[1][0] for part_NK in parts])

    def turns(self) -> dict[str, Callable[[], object]]:
        """Returns all that is timed, by name."""
        tokenizer, mask_NK = self.tokenizer, self.mask[0]
        square = torch.randn(_SQUARE, _SQUARE)
        return {
            "square": lambda: square @ square,
            "encode": lambda: tokenizer.latents(self.chunks, self.positions, self.mask),
            "quantise": lambda: self.greedy.encode(self.latents, mask_NK),
            "quantise_decode": lambda: self.greedy.decode(self.greedy.encode(self.latents, mask_NK)),
            "beam": lambda: self.wide.encode(self.latents, mask_NK),
            "decode": lambda: tokenizer.decode(self.codes.unsqueeze(0), self.positions, self.mask),
            "tokens": lambda: tokenizer.encode_windows(self.chunks, self.layout, self.windows),
            "peer_whole": lambda: self.peer_codes(whole=True),
            "peer_parts": lambda: self.peer_codes(whole=False),
        }

    def figures(self, seconds: dict[str, list[float]]) -> dict[str, float]:
        """Returns the medians of each round's ratios."""
        sizes, tokenizer = self.sizes, self.tokenizer
        coders = {"encode": tokenizer.encoder, "decode": tokenizer.decoder}
        products = {
            name: sum(parameter.numel() for parameter in coder.parameters() if parameter.ndim == 2)
            for name, coder in coders.items()
        }
        a_level = sizes.chunk_length * sizes.num_codes
        products["quantise"] = a_level * sizes.num_levels
        products["beam"] = a_level * (1 + self.beam * (sizes.num_levels - 1))
        products["tokens"] = products["encode"] + products["quantise"]
        each_square = [square / _SQUARE**3 for square in seconds["square"]]
        figures = {
            f"{name}_share": _ratio([each * self.num_chunks * number for each in each_square], seconds[name])
            for name, number in products.items()
        }
        whole = seconds["peer_whole"]
        best = [min(pair) for pair in zip(whole, seconds["peer_parts"], strict=True)]
        return figures | {
            "peer_ratio": _ratio(best, seconds["quantise_decode"]),
            "peer_ratio_whole": _ratio(whole, seconds["quantise_decode"]),
        }


def check_codes(quantiser: ResidualQuantiser, vectors_NK: Tensor, codes_NL: Tensor, other_NL: Tensor) -> None:
    """Asserts that greedy codes are equal, up to the first level at which two codes are equally near in float32."""
    assert codes_NL.shape == other_NL.shape, "another number of codes"
    residual_NK, is_same_N = vectors_NK.double(), torch.ones(len(vectors_NK), dtype=torch.bool)
    for level, codebook_VK in enumerate(quantiser.codebooks_LVK.double()):
        code_N, other_N = codes_NL[:, level], other_NL[:, level]
        differs_N = is_same_N & (code_N != other_N)
        distances = [
            (residual_NK[differs_N] - codebook_VK[each_N[differs_N]]).norm(dim=1) for each_N in (code_N, other_N)
        ]
        assert torch.allclose(*distances, rtol=1e-5, atol=1e-6), f"other codes at level {level}"
        is_same_N &= ~differs_N
        residual_NK = residual_NK - codebook_VK[code_N]
    assert bool(is_same_N.float().mean() > 0.99), "more than one vector of a hundred has other codes"


def _peer(quantiser: ResidualQuantiser) -> Any:
    try:
        package: Any = importlib.import_module("vector_quantize_pytorch")
    except ImportError as error:
        raise ValueError(f"benchmark tokenizer: it compares with {_PEER}; run `pip install {_PEER}`") from error
    L, V, K = quantiser.codebooks_LVK.shape
    peer = package.ResidualVQ(dim=K, num_quantizers=L, codebook_size=V).eval()
    for layer, codebook_VK in zip(peer.layers, quantiser.codebooks_LVK, strict=True):
        layer.codebook = codebook_VK.clone()
    return peer


def _ratio(numerators: list[float], denominators: list[float]) -> float:
    return median(above / below for above, below in zip(numerators, denominators, strict=True))


def _print(rates: dict[str, dict[str, float]]) -> None:
    table = Table("values per CPU second", *rates)
    for name in next(iter(rates.values())):
        table.add_row(name, *(f"{found[name]:,.0f}" for found in rates.values()))
    Console().print(table)
