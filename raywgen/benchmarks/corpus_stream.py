"""Compares the chunk stream with raw Arrow and a torch `DataLoader`, on Ray actors that read at the same time.

All three copy the same chunks into contiguous torch batches; that they are the same, value for value, is asserted
first. A first epoch begins with the shards out of the page cache. `stream_peers` compares ragged chunks, whole
checkpoints and the first batch with peers of their own.

Shape letters beyond the legend in `raywgen.weights`: B chunks of a batch on a worker.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raywgen.benchmarks import stream_peers
from raywgen.benchmarks.memory_peak import memory_peak
from raywgen.benchmarks.random_corpus import random_corpus
from raywgen.corpus import Corpus
from raywgen.corpus.chunk_stream import ChunkStream
from raywgen.training.session import ray_session

_GIB = 1 << 30
_STEP_SECONDS = 0.05


@dataclass(kw_only=True)
class CorpusStreamConfig:
    """The corpus to stream, and how it is measured.

    Attributes:
        num_checkpoints: Checkpoints of the corpus.
        num_values: Values of a checkpoint, float32.
        chunk_length: Values of a chunk (K).
        batch_size: Chunks of a batch over all workers.
        num_workers: Actors that read at once.
        num_batches: Batches of a measurement.
        rounds: Alternations; figures are medians.
        num_steps: Steps of the training loop whose waiting is measured.
        num_small: Networks of 9,882 values from which ragged chunks and whole checkpoints are read.
        folder: Folder of the corpus; a temporary one by default.
    """

    num_checkpoints: int = 64
    num_values: int = 17_000_000
    chunk_length: int = 4096
    batch_size: int = 2048
    num_workers: int = 2
    num_batches: int = 300
    rounds: int = 5
    num_steps: int = 60
    num_small: int = 4000
    folder: str = ""


def measure(config: CorpusStreamConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Makes corpora, then lets the readers take turns."""
    folder = Path(config.folder or tempfile.mkdtemp(prefix="raywgen-stream-"))
    small_figures, small_conditions = stream_peers.small_figures(folder / "small", config.num_small, config.rounds)
    corpus = random_corpus(folder, config.num_checkpoints, (config.num_values,))
    gigabytes = sum(shard.num_bytes for shard in corpus.shards) / 1e9
    with ray_session():
        readers = _start(config, corpus)
        assert all(ray.get([reader.equal.remote() for reader in readers])), "the readers give different values"
        _stop(readers)
        first: dict[str, list[float]] = {"stream": [], "pyarrow": []}
        for _ in range(config.rounds):
            for name, found in first.items():
                _forget(folder / "weights")
                fresh = _start(config, corpus)
                ray.get([reader.process_id.remote() for reader in fresh])
                found.append(sum(ray.get([reader.first_epoch.remote(name) for reader in fresh])))
                _stop(fresh)
        first_batch_figures, first_batch_conditions = _first_batch(folder, corpus, config)
        readers = _start(config, corpus)
        rates = {"stream": [], "pyarrow": [], "dataloader": []}
        for _ in range(config.rounds):
            for name, found in rates.items():
                found.append(sum(ray.get([reader.steady.remote(name) for reader in readers])))
        waits = ray.get([reader.exposed_wait.remote() for reader in readers])
        limited = _start(config, corpus)
        memory = ray.get([reader.epoch_under_limit.remote() for reader in limited])
    if not config.folder:
        shutil.rmtree(folder)
    figures = {
        "ratio_to_pyarrow": _ratio(rates["stream"], rates["pyarrow"]),
        "ratio_to_dataloader": _ratio(rates["stream"], rates["dataloader"]),
        "first_epoch_ratio": _ratio(first["stream"], first["pyarrow"]),
        "peak_anon_gib": max(peak for peak, _ in memory),
        "exposed_wait": max(waits),
        **small_figures,
        **first_batch_figures,
    }
    conditions = {
        "gigabytes": round(gigabytes, 2),
        "workers": config.num_workers,
        "chunk_length": config.chunk_length,
        "batch_size": config.batch_size,
        "gigabytes_per_second": {name: round(median(values), 2) for name, values in rates.items()},
        "first_epoch_gigabytes_per_second": {name: round(median(values), 2) for name, values in first.items()},
        "ratios": [round(a / b, 3) for a, b in zip(rates["stream"], rates["pyarrow"], strict=True)],
        "data_limit_gib": round(max(limit for _, limit in memory), 2),
        "step_seconds": _STEP_SECONDS,
        "cores": os.cpu_count(),
        **small_conditions,
        **first_batch_conditions,
    }
    return {name: round(value, 4) for name, value in figures.items()}, conditions


def _start(config: CorpusStreamConfig, corpus: Corpus) -> list[Any]:
    """Starts an actor for each worker."""
    actor: Any = ray.remote(num_cpus=0)(_Reader)
    return [actor.remote(asdict(config), corpus.location, rank) for rank in range(config.num_workers)]


def _stop(readers: list[Any]) -> None:
    """Kills actors and waits until they map no file: the kernel keeps mapped pages when it is asked to drop them."""
    processes = ray.get([reader.process_id.remote() for reader in readers])
    for reader in readers:
        ray.kill(reader)
    while any(_maps_files(process) for process in processes):
        time.sleep(0.02)


def _maps_files(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/maps").read_text())
    except OSError:
        return False


def _first_batch(folder: Path, corpus: Corpus, config: CorpusStreamConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Compares the time to the first batch with that of Hugging Face's `datasets`; nothing if it is not installed."""
    if not stream_peers.has_datasets():
        return {}, {"first_batch": "not measured: Hugging Face's datasets is not installed"}
    arrays = _open_arrays(corpus, config.num_values)
    paths = stream_peers.write_datasets_files(arrays, config.chunk_length, folder / "datasets")
    del arrays
    actor: Any = ray.remote(num_cpus=0)(stream_peers.FirstBatch)

    def ask(method: str, *arguments: str) -> Any:
        reader = actor.remote(corpus.location, paths, config.chunk_length, config.batch_size)
        answer = ray.get(getattr(reader, method).remote(*arguments))
        _stop([reader])
        return answer

    assert ask("equal"), "the first batch differs from the rows of datasets"
    seconds: dict[str, list[float]] = {"stream": [], "datasets": [], "cold_stream": [], "cold_datasets": []}
    for _ in range(config.rounds):
        for name, found in seconds.items():
            if name.startswith("cold"):
                _forget(folder / "weights")
                _forget(folder / "datasets")
            found.append(ask("seconds", name.removeprefix("cold_")))
    figures = {
        "first_batch_ratio": _ratio(seconds["stream"], seconds["datasets"]),
        "first_batch_cold_ratio": _ratio(seconds["cold_stream"], seconds["cold_datasets"]),
    }
    return figures, {
        "first_batch_seconds": {name: [round(value, 3) for value in found] for name, found in seconds.items()}
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


class _Reader:
    """One worker, an actor that reads its share of each batch."""

    def __init__(self, config: dict[str, Any], location: str, rank: int) -> None:
        torch.set_num_threads(1)
        self._config = CorpusStreamConfig(**config)
        self._corpus = Corpus.open(location)
        self._rank = rank

    def process_id(self) -> int:
        """Returns the id of the actor's process, once it has started."""
        return os.getpid()

    def equal(self) -> bool:
        """Whether all readers give the same batches."""
        sources = [self._source(name) for name in ("stream", "pyarrow", "dataloader")]
        for _ in range(3):
            ours, arrow, loader = (next(source) for source in sources)
            if not (torch.equal(ours, arrow) and torch.equal(ours, loader)):
                return False
        return True

    def steady(self, name: str) -> float:
        """Measures gigabytes a second after a warm-up."""
        source = self._source(name)
        for _ in range(5):
            next(source)
        return self._rate(source, self._config.num_batches)

    def first_epoch(self, name: str) -> float:
        """Measures gigabytes a second over an epoch, its beginning included."""
        begin = time.monotonic()
        source = self._source(name)
        done = sum(next(source).numel() for _ in range(self._stream().num_batches))
        return done * 4 / 1e9 / (time.monotonic() - begin)

    def exposed_wait(self) -> float:
        """Measures the share of a training loop's time spent waiting for batches."""
        source = self._source("stream")
        next(source)
        waited = 0.0
        begin = time.monotonic()
        for _ in range(self._config.num_steps):
            waiting_since = time.monotonic()
            next(source)
            waited += time.monotonic() - waiting_since
            time.sleep(_STEP_SECONDS)
        return waited / (time.monotonic() - begin)

    def epoch_under_limit(self) -> tuple[float, float]:
        """Measures the peak of anonymous memory over an epoch; returns it and the limit on private memory, in GiB."""
        held = _status("VmData")
        limit = held + _GIB
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        with memory_peak() as peak:
            for _ in self._stream().epoch():
                pass
            return peak() / _GIB, limit / _GIB

    def _stream(self, prefetch: int = 2) -> ChunkStream:
        return ChunkStream(
            self._corpus,
            chunk_length=self._config.chunk_length,
            batch_size=self._config.batch_size,
            rank=self._rank,
            num_workers=self._config.num_workers,
            prefetch=prefetch,
        )

    def _source(self, name: str) -> Iterator[Tensor]:
        makers: dict[str, Callable[[], Iterator[Tensor]]] = {
            "stream": lambda: (batch.values_BK for batch in self._stream()),
            "pyarrow": self._pyarrow,
            "dataloader": self._dataloader,
        }
        return makers[name]()

    def _plan(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yields the chunks of each batch of the stream: row of the facts, first value, length."""
        stream, cursor = self._stream(prefetch=0), None
        while True:
            cursor = stream.cursor if cursor is None else cursor
            checkpoint_B, chunk_B = stream.places(cursor)
            cursor = stream.after(cursor)
            starts = chunk_B * self._config.chunk_length
            lengths = np.minimum(self._config.chunk_length, self._config.num_values - starts)
            yield list(zip(checkpoint_B.tolist(), starts.tolist(), lengths.tolist(), strict=True))

    def _pyarrow(self) -> Iterator[Tensor]:
        """Reads by raw Arrow: memory-mapped shards, each chunk copied into one reused batch."""
        arrays = _open_arrays(self._corpus, self._config.num_values)
        rows = -(-self._config.batch_size // self._config.num_workers)
        out_BK = np.zeros((rows, self._config.chunk_length), dtype=np.float32)
        for places in self._plan():
            for index, (row, start, length) in enumerate(places):
                out_BK[index, :length] = arrays[row][start : start + length]
                out_BK[index, length:] = 0
            yield torch.from_numpy(out_BK[: len(places)])

    def _dataloader(self) -> Iterator[Tensor]:
        """Reads by torch's loader over the same shards: one chunk an item, default collation."""
        items = _Chunks(_open_arrays(self._corpus, self._config.num_values), self._config.chunk_length)
        yield from DataLoader(items, batch_sampler=_PlanSampler(self._plan()))

    def _rate(self, source: Iterator[Tensor], num_batches: int) -> float:
        begin = time.monotonic()
        done = sum(next(source).numel() for _ in range(num_batches))
        return done * 4 / 1e9 / (time.monotonic() - begin)


class _Chunks(Dataset[Tensor]):
    def __init__(self, arrays: list[np.ndarray], chunk_length: int) -> None:
        self._arrays = arrays
        self._chunk_length = chunk_length

    def __getitem__(self, place: tuple[int, int, int]) -> Tensor:
        row, start, length = place
        chunk = torch.zeros(self._chunk_length)
        chunk[:length] = torch.from_numpy(self._arrays[row][start : start + length].copy())
        return chunk


class _PlanSampler:
    def __init__(self, plan: Iterator[list[tuple[int, int, int]]]) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return self._plan


def _open_arrays(corpus: Corpus, num_values: int) -> list[np.ndarray]:
    """Returns each checkpoint's values as a view of its shard, in the order of the stream's facts."""
    facts = corpus.facts.sort_by([("shard", "ascending"), ("row", "ascending")])
    arrays = []
    for path in facts.column("shard").to_pylist():
        table = pa.ipc.open_file(pa.memory_map(f"{corpus.location}/{path}")).read_all()
        data = table.column("packed").chunk(0).buffers()[2]
        arrays.append(np.frombuffer(data, dtype=np.float32, count=num_values))
    return arrays


def _forget(folder: Path) -> None:
    """Asks the kernel to drop the files of a folder from its page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _status(name: str) -> int:
    """Returns a line of `/proc/self/status` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this kernel does not report {name}; the benchmark needs Linux")
