"""One writer a folder; what a killed or stopped one leaves half-written is gone after the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raywgen.corpus import BuildConfig, Corpus, build_corpus, verify_corpus
from raywgen.corpus.derive import dedupe, split
from raywgen.corpus.describe import describe
from raywgen.corpus.export import export
from raywgen.corpus.merge import merge
from raywgen.corpus.verify import repair_corpus
from raywgen.locks import LOCK, InUseError, only_one
from raywgen.weights import save_state_dict
from tests.corpus import builders

WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "build": lambda source, out: build_corpus(BuildConfig(out=str(out), sources=[str(source)], distributed=False)),
    "merge": lambda source, out: merge(str(out), [Corpus.open(source)]),
    "split": lambda source, out: split(str(out), Corpus.open(source), heldout=0.5),
    "dedupe": lambda source, out: dedupe(str(out), Corpus.open(source)),
    "export": lambda source, out: export(Corpus.open(source), out),
}
KILLED = """
import os, signal, sys
from pathlib import Path
from raywgen import storage
sync = storage.sync
count = 0
def stop(path, *more):
    global count
    count += 1
    if count == 3:
        if sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt
    return sync(path, *more)
storage.sync = stop
from tests.corpus.test_writing import WRITERS
WRITERS[sys.argv[4]](Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    builders.small_corpus(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_second_writer_learns_who_holds_the_folder(
    source: Path, tmp_path: Path, write: Callable[[Path, Path], object]
) -> None:
    with only_one(tmp_path / "out"), pytest.raises(InUseError, match=r"out is in use: `.*` \(process \d+ on"):
        write(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [LOCK]


def test_a_corpus_is_changed_in_place_by_one_at_a_time(source: Path) -> None:
    with only_one(source):
        with pytest.raises(InUseError, match="is in use"):
            describe(source, [], {})
        with pytest.raises(InUseError, match="is in use"):
            repair_corpus(source, [])


@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.parametrize("name", ["build", "split"])
def test_a_writer_that_was_stopped_leaves_nothing_half_written(
    source: Path, tmp_path: Path, name: str, how: str
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out), how, name]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == (-signal.SIGKILL if how == "kill" else -signal.SIGINT), ended.stderr
    assert not (out / "manifest.json").exists()
    partial = [path for path in out.rglob("*") if path.name.endswith(".partial")]
    assert bool(partial) == (how == "kill")
    WRITERS[name](source, out)
    assert verify_corpus(out) == []
    shards = {shard.path for shard in Corpus.open(out).shards}
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {LOCK, "manifest.json", "checkpoints.parquet", "tasks.parquet", *shards}


def test_an_export_removes_what_a_killed_one_left(source: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out" / ".hidden.safetensors"
    save_state_dict({"w": torch.ones(1)}, kept, {})
    (tmp_path / "out" / ".wide1.safetensors.4194303").write_bytes(b"half")
    export(Corpus.open(source), tmp_path / "out", ["architecture=", "split=train"])
    names = set(os.listdir(tmp_path / "out"))
    assert {".hidden.safetensors", "wide1.safetensors"} <= names
    assert ".wide1.safetensors.4194303" not in names


def test_a_damaged_journal_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "nets" / "a.safetensors")
    save_file({"w": torch.tensor([float("nan")])}, tmp_path / "nets" / "b.safetensors")
    config = BuildConfig(out=str(tmp_path / "out"), sources=[str(tmp_path / "nets")], distributed=False, strict=True)
    with pytest.raises(ValueError, match="1 checkpoints were refused"):
        build_corpus(config)
    (journal,) = (tmp_path / "out" / "units").iterdir()
    content = json.loads(journal.read_text())
    content["shards"][0]["facts"][0]["step"] = 7
    journal.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"units/{journal.name} is damaged; delete it and run the same command"):
        build_corpus(config)
