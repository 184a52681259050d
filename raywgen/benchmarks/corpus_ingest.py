"""Compares ingest with a plain loop that loads, hashes and writes the same tensors in one process.

Large files: one checkpoint of the size of ViT-L, as `.safetensors` and as `.pt`, and some of the size of ResNet-101.
Small files: many of one architecture in both forms. `data=PATH` adds real checkpoints. Both sides sync to disk, and
what was stored is compared with the files, bit for bit, before a time counts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.training.session import ray_session

_WIDTH = 1024
_RESNET_101_VALUES = 44_549_160


@dataclass(kw_only=True)
class CorpusIngestConfig:
    """The files to ingest.

    Attributes:
        num_blocks: Blocks of the two large files, of 12.6 M values each; ViT-L has 24.
        num_medium: Files of 44.5 M values beside the two large ones.
        num_small: Files of 2,190 values in each of both forms.
        rounds: Pairs of runs; figures are medians.
        data: A folder with real checkpoints to ingest as well.
        folder: Folder of files and corpora; a temporary one by default.
    """

    num_blocks: int = 24
    num_medium: int = 10
    num_small: int = 10_000
    rounds: int = 3
    data: str = ""
    folder: str = ""


def measure(config: CorpusIngestConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Makes the files, then alternates ingest and plain loop."""
    folder = Path(config.folder or tempfile.mkdtemp(prefix="raywgen-ingest-"))
    large, pt, safe = folder / "large", folder / "pt", folder / "safetensors"
    _make_large(large, config)
    _make_small(pt, safe, config.num_small)
    out = folder / "out"
    ratios: dict[str, list[float]] = {"ray": [], "here": [], "safetensors": [], "pt": []}
    with ray_session():
        for _ in range(config.rounds):
            plain = _plain_loop(large, out)
            ratios["ray"].append(plain / _ingest(large, out, distributed=True))
            ratios["here"].append(plain / _ingest(large, out, distributed=False))
            ratios["safetensors"].append(config.num_small / _ingest(safe, out, distributed=False))
            ratios["pt"].append(config.num_small / _ingest(pt, out, distributed=False))
    num_bytes = sum(file.stat().st_size for place in (large, pt, safe) for file in place.iterdir())
    large_bytes = sum(file.stat().st_size for file in large.iterdir())
    if not config.folder:
        shutil.rmtree(folder)
    figures = {
        "ratio_to_copy": median(ratios["ray"]),
        "ratio_to_copy_one_process": median(ratios["here"]),
        "small_safetensors_per_second": median(ratios["safetensors"]),
        "small_pt_per_second": median(ratios["pt"]),
    }
    conditions = {
        "gigabytes": round(num_bytes / 1e9, 2),
        "large_gigabytes": round(large_bytes / 1e9, 2),
        "small_files": 2 * config.num_small,
        "rounds": config.rounds,
        "all_rounds": {name: [round(value, 3) for value in values] for name, values in ratios.items()},
        "cores": os.cpu_count(),
    }
    return {name: round(value, 3) for name, value in figures.items()}, conditions


def _ingest(source: Path, out: Path, *, distributed: bool) -> float:
    """Measures one ingest from nothing in seconds, and compares what it stored with the files."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    begin = time.monotonic()
    corpus = build_corpus(BuildConfig(out=str(out), sources=[str(source)], distributed=distributed))
    os.sync()
    seconds = time.monotonic() - begin
    _assert_equal(corpus, source)
    return seconds


def _assert_equal(corpus: Corpus, source: Path) -> None:
    files = sorted(source.iterdir())
    assert corpus.facts.num_rows == len(files)
    for file in files[:: max(1, len(files) // 50)]:
        terms = [f"source={file.absolute()}"]
        ((_, stored),) = corpus.checkpoints(terms)
        for name, tensor in _load(file).items():
            assert torch.equal(stored[name], tensor), f"{file}: {name}"


def _load(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def _plain_loop(source: Path, out: Path) -> float:
    """Measures in seconds the loop that anybody would write."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.sync()
    schema = pa.schema([("name", pa.string()), ("tensor", pa.large_binary())])
    begin = time.monotonic()
    for file in sorted(source.iterdir()):
        state = _load(file)
        digest = hashlib.sha256()
        with pa.OSFile(str(out / f"{file.name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for name, tensor in state.items():
                raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                digest.update(raw.data)
                offsets = pa.py_buffer(torch.tensor([0, len(raw)]).numpy())
                column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(raw)])
                writer.write_batch(pa.record_batch([pa.array([name]), column], schema=schema))
        (out / f"{file.name}.sha256").write_text(digest.hexdigest())
    os.sync()
    return time.monotonic() - begin


def _make_large(folder: Path, config: CorpusIngestConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = _vit(config.num_blocks)
    save_file(state, folder / "vit_l.safetensors")
    torch.save(state, folder / "vit_l.pt")
    for index in range(config.num_medium):
        parts = torch.randn(_RESNET_101_VALUES, generator=torch.Generator().manual_seed(index)).split(1 << 20)
        state = {f"layer{number}.weight": part.clone() for number, part in enumerate(parts)}
        save_file(state, folder / f"medium_{index}.safetensors")
    for file in sorted(Path(config.data).iterdir()) if config.data else []:
        shutil.copy(file, folder / f"real_{file.name}")


def _vit(num_blocks: int) -> dict[str, Tensor]:
    """Makes values in the shapes of ViT-L/16: 304 M with its 24 blocks."""
    width, generator = _WIDTH, torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (width, 3, 16, 16),
        "patch_embed.bias": (width,),
        "pos_embed": (1, 197, width),
        "cls_token": (1, 1, width),
        "head.weight": (1000, width),
        "head.bias": (1000,),
    }
    for block in range(num_blocks):
        for name, rows, columns in _linears(width):
            shapes[f"blocks.{block}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{block}.{name}.bias"] = (rows,)
        for norm in ("norm1", "norm2"):
            shapes[f"blocks.{block}.{norm}.weight"] = (width,)
            shapes[f"blocks.{block}.{norm}.bias"] = (width,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _linears(width: int) -> Iterable[tuple[str, int, int]]:
    yield "attn.qkv", 3 * width, width
    yield "attn.proj", width, width
    yield "mlp.fc1", 4 * width, width
    yield "mlp.fc2", width, 4 * width


def _make_small(pt: Path, safe: Path, num: int) -> None:
    for folder in (pt, safe):
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(num):
        generator = torch.Generator().manual_seed(index)
        shapes = {"0.weight": (28, 64), "0.bias": (28,), "2.weight": (10, 28), "2.bias": (10,), "3.weight": (8, 10)}
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        torch.save(state, pt / f"{index:06d}.pt")
        save_file(state, safe / f"{index:06d}.safetensors")
