"""Measures how fast the prior of IGPG writes tokens, beside Hugging Face's `generate` on a GPT-2 of the same size.

    ratio_to_hf_batchN    tokens per CPU second of the prior, in bfloat16 and compiled, over those of the GPT-2 in
                          float32 with the better of its caches, N sequences at once
    ratio_fp32_batchN     likewise, the prior in float32 and compiled
    ratio_bf16_batchN     likewise, both in bfloat16
    compiled_batchN       tokens per CPU second compiled over those uncompiled, both in float32
    share_of_limit        time that the matrix products of a step take at the rate of one such product, or reading the
                          cache at the rate of a plain maximum, whichever is longer, over the time of a step; in
                          float32 with a cache in bfloat16, and `limit_batch` sequences
    share_of_limit_fp32   likewise with the cache in float32
    share_of_limit_bf16   likewise with both in bfloat16

Prior and GPT-2 have the same depth, width, heads and vocabulary, and draw as many tokens after a prompt of three.
Before anything is timed, the logits of the cached and the full pass must be equal in both, and compiled tokens must be
those that are written without compiling.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPG, IGPGConfig, IGPGTaskLossConfig, PriorConfig, SamplingConfig
from raywgen.generators.igpg.token_sampling import sample_tokens
from raywgen.generators.interface import DataSpec
from raywgen.nn.conditions import ConditionEncoder
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.weights import Condition, KeyedNoise, Layout

_CHUNK_LENGTH = 64
_NUM_SAMPLES, _NUM_FEATURES, _NUM_CLASSES = 4, 8, 2
_NUM_CHECKED = 24
PLAIN = SamplingConfig(decoding="tokens", compile="never")
COMPILED = SamplingConfig(decoding="tokens", compile="always")
HALF_CACHE = SamplingConfig(decoding="tokens", compile="always", half_cache=True)
HALF = SamplingConfig(decoding="tokens", compile="always", precision="bf16", half_cache=True)


@dataclass(kw_only=True)
class DecodeConfig:
    """The models, and what they write.

    Attributes:
        width: Width of both.
        num_layers: Blocks of both.
        num_heads: Heads of both.
        num_codes: Codes of the prior's one level, and words of the GPT-2.
        num_positions: Most positions of the GPT-2.
        num_tokens: Tokens that are drawn for each sequence.
        batches: Numbers of sequences that are written at once.
        limit_batch: Number of sequences of `share_of_limit`.
        rounds: Rounds of timing; in each of them all take turns.
        threads: Threads of torch.
    """

    width: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_codes: int = 1024
    num_positions: int = 1024
    num_tokens: int = 512
    batches: list[int] = field(default_factory=lambda: [1, 32])
    limit_batch: int = 64
    rounds: int = 3
    threads: int = 1

    def __post_init__(self) -> None:
        longest = self.num_positions - ConditionEncoder.num_tokens
        if not _NUM_CHECKED <= self.num_tokens <= longest:
            raise ValueError(f"num_tokens={self.num_tokens}: give {_NUM_CHECKED} to {longest}")
        if min(self.limit_batch, self.rounds, self.threads, *self.batches) < 1:
            raise ValueError("batches, limit_batch, rounds and threads must be at least 1")


def measure(config: DecodeConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Checks equality, then times all of them in turns for each number of sequences."""
    torch.set_num_threads(config.threads)
    prior, peer = Writer(config), Peer(config)
    prior.check()
    peer.check()
    rates: dict[str, dict[str, float]] = {}
    figures: dict[str, float] = {}
    for batch in config.batches:
        rates[f"batch{batch}"] = found = _rates(config, prior, peer, batch)
        best = max(found["hf_dynamic"], found["hf_static"])
        figures[f"ratio_to_hf_batch{batch}"] = found["bf16"] / best
        figures[f"ratio_fp32_batch{batch}"] = found["fp32"] / best
        figures[f"ratio_bf16_batch{batch}"] = found["bf16"] / max(found["hf_bf16_dynamic"], found["hf_bf16_static"])
        figures[f"compiled_batch{batch}"] = found["fp32"] / found["fp32_uncompiled"]
    limits: dict[str, dict[str, float]] = {}
    for name, sampling in (("", HALF_CACHE), ("_fp32", COMPILED), ("_bf16", HALF)):
        figures[f"share_of_limit{name}"], limits[f"limit{name}"] = _share_of_limit(config, prior, sampling)
    _print(rates)
    conditions = {
        "tokens_per_cpu_second": rates,
        "limits": limits,
        "parameters": {"prior_trunk": prior.num_values, "gpt2": peer.num_values},
        "num_tokens": config.num_tokens,
        "rounds": config.rounds,
        "threads": config.threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    return {name: round(value, 3) for name, value in figures.items()}, conditions


def cpu_seconds(work: Callable[[], object]) -> float:
    """Returns the CPU seconds of this process for some work, on which other processes have little influence."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _rates(config: DecodeConfig, prior: Writer, peer: Peer, batch: int) -> dict[str, float]:
    """Tokens per CPU second: the median over rounds in which all take turns, after one that compiles."""
    turns = {
        "fp32_uncompiled": lambda: prior.write(batch, config.num_tokens, PLAIN),
        "fp32": lambda: prior.write(batch, config.num_tokens, COMPILED),
        "bf16": lambda: prior.write(batch, config.num_tokens, HALF),
        "hf_dynamic": lambda: peer.write(batch, config.num_tokens, "dynamic"),
        "hf_static": lambda: peer.write(batch, config.num_tokens, "static"),
        "hf_bf16_dynamic": lambda: peer.write(batch, config.num_tokens, "dynamic", torch.bfloat16),
        "hf_bf16_static": lambda: peer.write(batch, config.num_tokens, "static", torch.bfloat16),
    }
    for name in ("fp32", "bf16"):
        turns[name]()
    seconds = {name: [] for name in turns}
    for _ in range(config.rounds):
        for name, work in turns.items():
            seconds[name].append(cpu_seconds(work))
    found = {name: round(batch * config.num_tokens / median(taken), 1) for name, taken in seconds.items()}
    print(f"batch {batch}: {found}", flush=True)
    return found


def _share_of_limit(config: DecodeConfig, prior: Writer, sampling: SamplingConfig) -> tuple[float, dict[str, float]]:
    batch, dtype = config.limit_batch, torch.bfloat16 if sampling.precision == "bf16" else torch.float32
    cache_dtype, numbers_dtype = (torch.bfloat16, torch.int16) if sampling.half_cache else (torch.float32, torch.int32)
    prior.write(batch, config.num_tokens, sampling)
    step = median(
        cpu_seconds(lambda: prior.write(batch, config.num_tokens, sampling)) / config.num_tokens
        for _ in range(config.rounds)
    )
    x = torch.randn(batch, config.width, dtype=dtype)
    weight = torch.randn(4 * config.width, config.width, dtype=dtype)
    product = _fastest(lambda: nn.functional.linear(x, weight))
    products = product * prior.num_values / weight.numel()
    # Half of the positions of the cache are written in the mean over all steps.
    cache = torch.ones(config.num_layers * batch * config.width * config.num_tokens, dtype=cache_dtype)
    numbers = cache.view(numbers_dtype)
    reading = _fastest(lambda: numbers.max())
    limit = {"products_ms": 1e3 * products, "cache_ms": 1e3 * reading, "step_ms": 1e3 * step}
    return max(products, reading) / step, {name: round(value, 3) for name, value in limit.items()}


def _fastest(work: Callable[[], object], repeats: int = 20) -> float:
    work()
    return min(cpu_seconds(work) for _ in range(repeats))


class Writer:
    """The prior, untrained, on one window of one tensor."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        quantiser = QuantiserConfig(num_levels=1, num_codes=config.num_codes)
        igpg = IGPGConfig(
            tokenizer=TokenizerConfig(chunk_length=_CHUNK_LENGTH, quantiser=quantiser),
            prior=PriorConfig(width=config.width, num_layers=config.num_layers, num_heads=config.num_heads, window=0),
            task_loss=IGPGTaskLossConfig(num_steps=0),
        )
        torch.manual_seed(0)
        self.generator = IGPG(igpg, {}, DataSpec(num_features=_NUM_FEATURES, max_classes=_NUM_CLASSES)).eval()
        self.trunk = self.generator.prior.trunk
        self.num_values = sum(parameter.numel() for parameter in self.trunk.parameters() if parameter.ndim == 2)

    def write(self, batch: int, num_tokens: int, sampling: SamplingConfig) -> Tensor:
        """Draws the tokens `(B, M)` of networks of so many chunks."""
        generator = self.generator
        layout = Layout.from_state_dict({"weight": torch.zeros(num_tokens, _CHUNK_LENGTH)})
        condition = Condition(
            instructions=("",) * batch,
            samples_BSF=torch.zeros(batch, _NUM_SAMPLES, _NUM_FEATURES),
            labels_BS=torch.zeros(batch, _NUM_SAMPLES, dtype=torch.int64),
        )
        table, noise = generator.tokenizer.table(layout), KeyedNoise(0, torch.arange(batch))
        rvq = generator.tokenizer.quantiser
        return sample_tokens(generator.prior, condition, table, rvq, noise, 1.0, sampling).codes_BML[..., 0]

    @torch.no_grad()
    def check(self) -> None:
        """Asserts that cached steps give the states of one full pass, and compiled ones the same tokens."""
        x_BTH = torch.randn(2, _NUM_CHECKED, self.config.width)
        cache = self.trunk.new_cache(2, _NUM_CHECKED)
        steps = torch.cat([self.trunk(part, cache) for part in x_BTH.split(1, dim=1)], dim=1)
        torch.testing.assert_close(steps, self.trunk(x_BTH), rtol=1e-4, atol=1e-4)
        for batch in self.config.batches:
            plain, compiled = (self.write(batch, _NUM_CHECKED, sampling) for sampling in (PLAIN, COMPILED))
            assert torch.equal(plain, compiled), "compiled steps write other tokens"


class Peer:
    """A GPT-2 of the package `transformers`, untrained."""

    def __init__(self, config: DecodeConfig) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        sizes = GPT2Config(
            vocab_size=config.num_codes,
            n_positions=config.num_positions,
            n_embd=config.width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        self.num_words = config.num_codes
        self.models: dict[torch.dtype, Any] = {}
        for dtype in (torch.float32, torch.bfloat16):
            model: Any = GPT2LMHeadModel(sizes)
            self.models[dtype] = model.eval().to(dtype)
        blocks = self.models[torch.float32].transformer.h
        self.num_values = sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim == 2)

    def write(self, batch: int, num_tokens: int, cache: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draws tokens `(B, M)` after a prompt as long as the prior's."""
        # Compiled, it would take new shapes at every length of the prompt; it is timed as `generate` comes.
        settings = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
        prompt = torch.ones(batch, ConditionEncoder.num_tokens, dtype=torch.int64)
        model = self.models[dtype]
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=True,
            top_k=0,
            **settings,
        )
        return found[:, prompt.shape[1] :]

    @torch.no_grad()
    def check(self) -> None:
        """Asserts that cached steps give the logits of one full pass."""
        model = self.models[torch.float32]
        ids = (torch.arange(_NUM_CHECKED) % self.num_words).unsqueeze(0)
        cache, steps = None, []
        for word in ids.split(1, dim=1):
            found = model(word, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            steps.append(found.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)


def _print(rates: dict[str, dict[str, float]]) -> None:
    table = Table("tokens per CPU second", *rates)
    for name in next(iter(rates.values())):
        table.add_row(name, *(f"{found[name]:,.0f}" for found in rates.values()))
    Console().print(table)
