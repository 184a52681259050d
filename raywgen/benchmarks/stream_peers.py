"""Cases that `corpus-stream` compares beside steady reading: ragged chunks, whole checkpoints, and the first batch.

Ragged chunks and whole checkpoints are read from a corpus of small networks, in CPU seconds of one thread, because they
are bound by it. The first batch is compared with Hugging Face's `datasets`, in seconds, in processes of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus

# A network of 9,882 values: nine chunks of the even length, or nine of the ragged one and 882 values.
_EVEN, _RAGGED = 1098, 1000
_SMALL_BATCH = 1 << 21
_HF_ROWS_PER_BATCH = 1000


def small_figures(folder: Path, num_networks: int, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures ragged against even chunks, and whole checkpoints against a loop over their safetensors files."""
    files = _small_files(folder / "files", num_networks)
    out = str(folder / "small")
    corpus = build_corpus(BuildConfig(out=out, sources=[str(folder / "files")], distributed=False))
    _assert_same_chunks(corpus)
    _assert_same_checkpoints(corpus, files)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chunks = _alternate(rounds, lambda: _read_epoch(corpus, _RAGGED), lambda: _read_epoch(corpus, _EVEN))
    whole = _alternate(rounds, lambda: _read_checkpoints(corpus), lambda: [load_file(file) for file in files])
    torch.set_num_threads(threads)
    ragged, checkpoints = [a / b for a, b in chunks], [b / a for a, b in whole]
    figures = {"ragged_ratio": median(ragged), "checkpoints_ratio": median(checkpoints)}
    conditions = {
        "small_networks": num_networks,
        "even_and_ragged_length": [_EVEN, _RAGGED],
        "ragged_ratios": [round(ratio, 3) for ratio in ragged],
        "checkpoints_ratios": [round(ratio, 3) for ratio in checkpoints],
        "checkpoints_per_cpu_second": round(num_networks / median(ours for ours, _ in whole)),
        "safetensors_per_cpu_second": round(num_networks / median(theirs for _, theirs in whole)),
    }
    return figures, conditions


def has_datasets() -> bool:
    """Whether Hugging Face's `datasets` is installed."""
    return importlib.util.find_spec("datasets") is not None


def write_datasets_files(arrays: list[np.ndarray], chunk_length: int, folder: Path) -> list[str]:
    """Writes an Arrow file of `datasets` for each checkpoint: one row a chunk, the last filled with zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("values", pa.list_(pa.float32(), chunk_length))])
    paths = []
    for index, array in enumerate(arrays):
        padded = np.zeros(-(-len(array) // chunk_length) * chunk_length, dtype=np.float32)
        padded[: len(array)] = array
        column = pa.FixedSizeListArray.from_arrays(pa.array(padded), chunk_length)
        path = str(folder / f"{index:05d}.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pa.table([column], schema=schema), max_chunksize=_HF_ROWS_PER_BATCH)
        paths.append(path)
    return paths


class FirstBatch:
    """A fresh process that opens a corpus, or the same chunks in `datasets`, and reads one shuffled batch."""

    def __init__(self, location: str, paths: list[str], chunk_length: int, batch_size: int) -> None:
        self._location, self._paths = location, paths
        self._chunk_length, self._batch_size = chunk_length, batch_size
        # Both libraries are imported before anything is timed.
        self._datasets: Any = importlib.import_module("datasets")
        torch.set_num_threads(1)

    def process_id(self) -> int:
        """Returns the id of the actor's process."""
        return os.getpid()

    def seconds(self, name: str) -> float:
        """Measures the time until the first batch is there."""
        begin = time.monotonic()
        _ = self._ours()[0] if name == "stream" else self._theirs()
        return time.monotonic() - begin

    def equal(self) -> bool:
        """Whether the chunks of the stream's first batch are the rows of `datasets` that hold them."""
        values_BK, row_B = self._ours()
        found = self._opened()[row_B.tolist()]["values"]
        return torch.equal(values_BK, found)

    def _ours(self) -> tuple[Tensor, np.ndarray]:
        corpus = Corpus.open(self._location)
        stream = corpus.stream(chunk_length=self._chunk_length, batch_size=self._batch_size, prefetch=0)
        batch = stream.read(stream.cursor)
        return batch.values_BK, batch.checkpoint_B.numpy() * (stream.num_items // stream.facts.num_rows) + (
            batch.chunk_B.numpy()
        )

    def _theirs(self) -> Tensor:
        return self._opened().shuffle(seed=0, keep_in_memory=True)[: self._batch_size]["values"]

    def _opened(self) -> Any:
        parts = [self._datasets.Dataset.from_file(path) for path in self._paths]
        return self._datasets.concatenate_datasets(parts).with_format("torch")


def _small_files(folder: Path, num_networks: int) -> list[Path]:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    files = []
    for index in range(num_networks):
        convolutions = [nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 32, 3)]
        network = nn.Sequential(*convolutions, nn.Linear(32, 64), nn.Linear(64, 10))
        files.append(folder / f"{index:06d}.safetensors")
        save_file(network.state_dict(), files[-1])
    return files


def _assert_same_chunks(corpus: Corpus) -> None:
    """Asserts that ragged and even chunks are the flat vectors' values."""
    for length in (_EVEN, _RAGGED):
        stream = corpus.stream(chunk_length=length, batch_size=_SMALL_BATCH // length, prefetch=0)
        values_ND = corpus.values(stream.facts)
        for batch in stream.epoch():
            for row, chunk, size, found in zip(
                batch.checkpoint_B.tolist(),
                batch.chunk_B.tolist(),
                batch.length_B.tolist(),
                batch.values_BK,
                strict=True,
            ):
                assert torch.equal(found[:size], values_ND[row, chunk * length :][:length]), "a chunk differs"
                assert not found[size:].any(), "a chunk is not filled with zeros"


def _assert_same_checkpoints(corpus: Corpus, files: list[Path]) -> None:
    """Asserts that every checkpoint is that of its file, bit for bit."""
    by_name = {file.stem: file for file in files}
    for facts, state in corpus.checkpoints():
        expected = load_file(by_name.pop(Path(facts["checkpoint_id"]).name))
        assert state.keys() == expected.keys(), "a checkpoint has other tensors than its file"
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items()), "a tensor differs"
    assert not by_name, "a file has no checkpoint"


def _read_epoch(corpus: Corpus, length: int) -> None:
    stream = corpus.stream(chunk_length=length, batch_size=_SMALL_BATCH // length, prefetch=0)
    cursor = stream.cursor
    for _ in range(stream.num_batches):
        cursor = stream.read(cursor).cursor


def _read_checkpoints(corpus: Corpus) -> None:
    # Opened anew, so that every checksum is compared in every round.
    for _ in Corpus.open(corpus.location).checkpoints():
        pass


def _alternate(rounds: int, ours: Callable[[], object], theirs: Callable[[], object]) -> list[tuple[float, float]]:
    """Returns CPU seconds of both in each round, after one round that does not count."""

    def seconds(act: Callable[[], object]) -> float:
        begin = time.process_time()
        act()
        return time.process_time() - begin

    return [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]
