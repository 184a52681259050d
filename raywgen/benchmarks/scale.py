"""Takes a large network through the whole path on this machine, from a file of weights to a generated network.

    seconds_corpus       time to make a corpus of the files
    seconds_tokenizer    time to train the tokeniser for some steps
    seconds_tokens       time to encode the corpus into a corpus of tokens
    seconds_prior        time to train the prior on these for some steps
    seconds_generate     time to generate the network in full, loading and compiling included
    seconds_load         time to load it into a module by `load_state_dict(strict=True)`
    values_per_second    values generated in a second; compiling counts, and with `num_actors` the start of the actors
    peak_gib             most anonymous memory of the generating process, less that of the same for a tiny network; with
                         `num_actors` that of the largest of `sizes` in one process
    peak_gpu_gib         most memory of tensors on the GPU, where there is one
    slope                slope of the logarithm of the time over that of the size, over `sizes`; CPU seconds on a CPU
    actors_2_over_1      values a second over two actors, over those of one, of the largest of `sizes`
    bits_per_value       bits of the tokens of a network over its values
    snr_db               signal-to-noise ratio of the network that the tokens stand for, in units of each tensor's scale

Weights are seeded noise in the layout of a real model, and every token of the generated network is drawn. So that no
layout is unknown, the corpus also holds a tiny network and those of `sizes`, which are the model's first tensors.
Tokeniser and prior are trained for a few steps: they say how long things take, and nothing of quality beyond
`bits_per_value` and `snr_db`. Each measurement of generation has a process of its own.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from raywgen.benchmarks.scale_networks import Model, cut, empty_module, write_seeded
from raywgen.benchmarks.scale_processes import in_own_process, slope, steady_rate
from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.tokens import TokenCorpus
from raywgen.generation import GenerateConfig, generate, load
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPG, IGPGConfig, IGPGTaskLossConfig, PriorConfig, SamplingConfig
from raywgen.nn.devices import Device, resolved_device
from raywgen.training import TrainConfig, launch
from raywgen.training.encode_corpus import EncodeConfig, encode_corpus
from raywgen.training.session import ray_session
from raywgen.training.stored_weights import StoredWeights, part_reader
from raywgen.weights import Layout

_GIB = 1 << 30
_TINY = "tiny"
_TINY_VALUES = 4096
_SHARES, _SHARES_OF_SMALL = (64, 32, 16, 8), (8, 4, 2, 1)
_SMALL = 10_000_000
_PIECES_OF_ACTORS = 16
_CHUNKS_AT_ONCE = 1 << 14


def _igpg() -> IGPGConfig:
    return IGPGConfig(
        tokenizer=TokenizerConfig(num_steps=20, batch_size=8),
        prior=PriorConfig(num_steps=10, batch_size=4, window=512),
        task_loss=IGPGTaskLossConfig(num_steps=0),
        sampling=SamplingConfig(windows="parallel", precision="auto"),
    )


@dataclass(kw_only=True)
class ScaleConfig:
    """The network, and how it is generated.

    Attributes:
        model: `resnet101` (44.5 M values, torchvision's layout), `vit_large` (304 M, timm's), `billion` (a perceptron
            of four wide layers) or `small` (0.16 M, a ViT).
        generator: The generator: a prior of the default size (3 layers of width 128) with windows of 512 chunks, a
            tokeniser of 4 bits a value (`tokenizer.chunk_length=16`, and `tokenizer.quantiser` with 8 levels of 256
            codes), 10 and 20 steps, windows in parallel, bfloat16 where the processor has units for it.
        sizes: Values of the networks of `slope`, at least four; by default 1/64, 1/32, 1/16 and 1/8 of the
            model, or of `small` 1/8, 1/4, 1/2 and all.
        temperature: Temperature of the tokens.
        piece_values: Values of a piece; smaller networks are generated whole.
        threads: Threads of a process that trains or generates, and CPUs of an actor.
        num_actors: Actors that generate the whole network over Ray; 0 generates it in one process.
        device: `cpu`, `cuda` or `auto`, of training and generation.
        compare_actors: Whether `actors_2_over_1` is measured; on a CPU, over Ray.
        folder: Folder of all files; a temporary one by default. The same command uses what was done there before, and
            the seconds are then those of the rest.
    """

    model: Model = "small"
    generator: IGPGConfig = field(default_factory=_igpg)
    sizes: list[int] = field(default_factory=list)
    temperature: float = 1.0
    piece_values: int = 1 << 20
    threads: int = 1
    num_actors: int = 0
    device: Device = "auto"
    compare_actors: bool = True
    folder: str = ""

    def __post_init__(self) -> None:
        if self.sizes and (len(set(self.sizes)) < 4 or min(self.sizes) < 1):
            raise ValueError(f"sizes={self.sizes}: give at least four different numbers of values")
        if min(self.piece_values, self.threads) < 1 or self.num_actors < 0:
            raise ValueError("piece_values and threads must be at least 1, num_actors at least 0")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: at 0 no token is drawn; give a number above 0")
        if self.generator.tokenizer.codes_scales:
            raise ValueError("generator.tokenizer.scales: this benchmark measures scales=normalizer alone")


def measure(config: ScaleConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Makes a corpus, trains a generator on it, generates the model in full and some smaller networks, and compares."""
    torch.set_num_threads(config.threads)
    folder = Path(config.folder or tempfile.mkdtemp(prefix="raywgen-scale-"))
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = work()
        seconds[f"seconds_{stage}"] = time.perf_counter() - begin
        print(f"{stage}: {seconds[f'seconds_{stage}']:.1f} s", flush=True)
        return found

    layouts = _write_networks(config, folder / "networks")
    corpus = timed("corpus", lambda: _corpus(folder))
    timed("tokenizer", lambda: launch([_run(config, folder, "tokenizer")]))
    encoding = EncodeConfig(
        corpus=corpus.location,
        tokenizer=str(folder / "tokenizer"),
        out=str(folder / "tokens"),
        where="here",
        device=config.device,
    )
    tokens = timed("tokens", lambda: encode_corpus(encoding))
    seconds["seconds_prior"] = _train_prior(config, folder)
    figures = _generated(config, folder, corpus, layouts, timed)
    bits, snr = kept_by_tokens(folder / "prior", corpus, tokens, layouts[config.model])
    figures = seconds | figures | {"bits_per_value": bits, "snr_db": snr}
    conditions = {
        "model": config.model,
        "values": {name: layout.num_values for name, layout in layouts.items()},
        "generator": asdict(config.generator),
        "temperature": config.temperature,
        "piece_values": config.piece_values,
        "threads": config.threads,
        "num_actors": config.num_actors,
        "device": str(resolved_device(config.device)),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    if not config.folder:
        shutil.rmtree(folder)
    return {name: round(value, 4) for name, value in figures.items()}, conditions


def _write_networks(config: ScaleConfig, folder: Path) -> dict[str, Layout]:
    """Writes the model, the networks of `sizes` and a tiny one; returns the layout of each.

    Raises:
        ValueError: One of `sizes` is larger than the model.
    """
    state = empty_module(config.model).state_dict()
    whole = Layout.from_state_dict(state).num_values
    shares = _SHARES_OF_SMALL if whole < _SMALL else _SHARES
    sizes = sorted(set(config.sizes) or {whole // share for share in shares})
    if sizes[-1] > whole:
        raise ValueError(f"sizes={config.sizes}: {config.model} has {whole:,} values; give fewer")
    states = {config.model: state, _TINY: cut(state, _TINY_VALUES)}
    states |= {f"cut-{size}": cut(state, size) for size in sizes if size < whole}
    layouts = {name: write_seeded(each, folder / name / "model.safetensors") for name, each in states.items()}
    return layouts | ({f"cut-{whole}": layouts[config.model]} if sizes[-1] == whole else {})


def _corpus(folder: Path) -> Corpus:
    return build_corpus(
        BuildConfig(out=str(folder / "corpus"), sources=[str(folder / "networks")], distributed=False, strict=True)
    )


def _run(config: ScaleConfig, folder: Path, name: str, tokens: str = "none") -> TrainConfig:
    """Returns the run that trains the tokeniser alone, or the one that trains the prior on its tokens, too."""
    generator = config.generator
    num_steps = generator.prior.num_steps if tokens != "none" else 0
    prior = replace(generator.prior, num_steps=num_steps, tokens=tokens)
    return TrainConfig(
        method="igpg",
        generator=replace(generator, prior=prior),
        corpus=str(folder / "corpus"),
        out=str(folder / name),
        num_workers=0,
        device=config.device,
        checkpoint_every=1000,
        validate_every=1000,
        log_every=1,
    )


def _train_prior(config: ScaleConfig, folder: Path) -> float:
    """Trains the same tokeniser again, then the prior on its tokens; returns the seconds of the prior."""
    begin = time.perf_counter()

    def on_progress(out: str, stage: str, *_: Any) -> None:
        nonlocal begin
        if stage == "tokenizer":
            begin = time.perf_counter()

    launch([_run(config, folder, "prior", str(folder / "tokens"))], on_progress)
    seconds = time.perf_counter() - begin
    print(f"prior: {seconds:.1f} s", flush=True)
    return seconds


def _generated(
    config: ScaleConfig,
    folder: Path,
    corpus: Corpus,
    layouts: dict[str, Layout],
    timed: Callable[[str, Callable[[], Any]], Any],
) -> dict[str, float]:
    """Generates the model in full, loads it, and returns the figures of generation."""
    settings = {name: _settings(config, folder, corpus, name, layout) for name, layout in layouts.items()}
    tiny = in_own_process([settings[_TINY]])
    asked = settings[config.model]
    if config.num_actors:
        asked = replace(asked, where="ray", num_actors=config.num_actors)
    whole = timed("generate", lambda: in_own_process([asked]))
    module = empty_module(config.model)
    timed("load", lambda: module.load_state_dict(load_file(whole.paths[0]), strict=True, assign=True))
    assert all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values()), "values that are not finite"
    names = [name for name in layouts if name.startswith("cut-")]
    # The first one is generated twice: the first time pays for what a process does once.
    cuts = in_own_process([settings[names[0]], *(settings[name] for name in names)])
    is_cpu = resolved_device(config.device).type == "cpu"
    taken = (cuts.cpu_seconds if is_cpu else cuts.seconds)[1:]
    sizes = [layouts[name].num_values for name in names]
    figures = {
        "values_per_second": layouts[config.model].num_values / whole.seconds[0],
        "peak_gib": ((cuts if config.num_actors else whole).peak - tiny.peak) / _GIB,
        "slope": slope(sizes, taken),
    }
    if not is_cpu and not config.num_actors:
        figures["peak_gpu_gib"] = whole.gpu_peak / _GIB
    _print(sizes, taken, figures["values_per_second"])
    if config.compare_actors and is_cpu:
        figures["actors_2_over_1"] = _actors(config, settings[names[-1]], sizes[-1])
    return figures


def _settings(config: ScaleConfig, folder: Path, corpus: Corpus, name: str, layout: Layout) -> GenerateConfig:
    return GenerateConfig(
        generator=str(folder / "prior"),
        corpus=corpus.location,
        network=corpus.networks[layout.id].name,
        out=str(folder / "generated" / name),
        temperature=config.temperature,
        piece_values=config.piece_values,
        threads=config.threads,
        device=config.device,
    )


def _actors(config: ScaleConfig, settings: GenerateConfig, num_values: int) -> float:
    """Returns values a second over two actors, over those of one."""
    rates = []
    generator = config.generator
    a_piece = max(1, num_values // _PIECES_OF_ACTORS)
    windows = a_piece // (generator.tokenizer.chunk_length * max(1, generator.prior.window))
    sampling = {"max_rows": max(1, min(windows, generator.sampling.max_rows))}
    with ray_session():
        for num in (1, 2):
            actors = replace(settings, where="ray", num_actors=num, piece_values=a_piece, sampling=sampling)
            actors.out = f"{settings.out}-{num}-actors"
            reports: list[tuple[float, int]] = []

            def on_values(done: int, total: int, reports: list[tuple[float, int]] = reports) -> None:
                reports.append((time.perf_counter(), done))

            generate(actors, on_values, on_values)
            rates.append(steady_rate(reports, num))
    print(f"values a second over one actor {rates[0]:,.0f}, over two {rates[1]:,.0f}", flush=True)
    return rates[1] / rates[0]


@torch.no_grad()
def kept_by_tokens(run: Path, corpus: Corpus, tokens: TokenCorpus, layout: Layout) -> tuple[float, float]:
    """Returns bits a value of a network's tokens, and the signal-to-noise ratio in decibels of what they stand for.

    Network and tokens are read in blocks.

    Args:
        run: The run whose tokeniser made the tokens.
        corpus: The corpus with one network of the layout.
        tokens: Its tokens.
        layout: The layout.
    """
    generator = load(str(run), device="cpu").generator
    assert isinstance(generator, IGPG)
    tokenizer, (layout, normalizer) = generator.tokenizer, generator.normalizers[layout.id]
    corpus.arrange(generator.layouts)
    facts = corpus.select(layout_id=layout.id)
    index_1 = torch.zeros(1, dtype=torch.int64)
    read = part_reader(StoredWeights(corpus, layout, facts), index_1)
    stored = tokens.of(layout.id, facts.column("checkpoint_id").to_pylist())
    num_chunks, K = tokenizer.num_chunks(layout), tokenizer.config.chunk_length
    signal = noise = 0.0
    for first, stop in pairwise([*range(0, num_chunks, _CHUNKS_AT_ONCE), num_chunks]):
        chunk_X = torch.arange(first, stop)
        codes_1XL = stored.codes(index_1, chunk_X.unsqueeze(0))
        mask_XK = tokenizer.mask(layout, chunk_X)
        chunks_1XK = tokenizer.decode(codes_1XL, tokenizer.positions(layout, chunk_X), mask_XK)
        decoded_1X = tokenizer.values_of_chunks(chunks_1XK, first, layout, normalizer, None)
        position_X = torch.arange(first * K, first * K + decoded_1X.shape[1])
        original_1X = normalizer.normalise(read(first * K, first * K + decoded_1X.shape[1]), position_X)
        signal += float(original_1X.double().square().sum())
        noise += float((normalizer.normalise(decoded_1X, position_X) - original_1X).double().square().sum())
    quantiser = tokenizer.quantiser
    bits = num_chunks * quantiser.num_tokens * math.log2(quantiser.num_codes) / layout.num_values
    return bits, 10 * math.log10(signal / noise)


def _print(sizes: list[int], seconds: list[float], rate: float) -> None:
    print(f"the whole network: {rate:,.0f} values a second", flush=True)
    table = Table("values", "seconds")
    for size, taken in zip(sizes, seconds, strict=True):
        table.add_row(f"{size:,}", f"{taken:.2f}")
    Console().print(table)
