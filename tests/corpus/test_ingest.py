"""What an ingest keeps, refuses, and gets over."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raywgen.corpus import Corpus, CorpusError, MissingFileError, verify_corpus
from raywgen.corpus.build import BuildConfig, build_corpus

NUM_GOOD = 48


class Runs:
    """Pickled, it asks to make a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def states() -> Iterator[tuple[str, dict[str, Tensor]]]:
    for index in range(NUM_GOOD):
        generator = torch.Generator().manual_seed(index)
        width = (3, 5, 400)[index % 3]
        yield (
            f"run-{index % 4}/net-{index}",
            {
                "weight": torch.randn(width, 200, generator=generator),
                "bias": torch.randn(width, generator=generator).half(),
                "num_batches_tracked": torch.tensor(index),
            },
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 sound checkpoints of three layouts in both forms, and four that must be refused."""
    folder = tmp_path_factory.mktemp("files")
    for index, (name, state) in enumerate(states()):
        (folder / name).parent.mkdir(exist_ok=True)
        if index % 2:
            torch.save({"epoch": 3, "state_dict": state}, folder / f"{name}.pt")
        else:
            save_file(state, folder / f"{name}.safetensors")
    bad = folder / "bad"
    bad.mkdir()
    save_file({"weight": torch.tensor([1.0, float("nan")])}, bad / "nan.safetensors")
    save_file({"weight": torch.tensor([1.0, float("inf")]).half()}, bad / "inf.safetensors")
    (bad / "cut.safetensors").write_bytes((folder / "run-0" / "net-0.safetensors").read_bytes()[:-9])
    torch.save(Runs(folder / "was-run"), bad / "hostile.pt")
    return folder


def content(corpus: Corpus) -> dict[str, tuple[str, str]]:
    facts = corpus.facts
    names = ("checkpoint_id", "layout_id", "sha256")
    rows = zip(*(facts.column(name).to_pylist() for name in names), strict=True)
    return {name: (layout_id, digest) for name, layout_id, digest in rows}


def small_units() -> None:
    import raywgen.corpus.ingest as ingest

    ingest._ITEM_CHECKPOINTS = 3


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    out = tmp_path_factory.mktemp("undisturbed") / "c"
    return build_corpus(BuildConfig(out=str(out), sources=[str(folder)], distributed=False))


def test_all_sound_checkpoints_come_back_bit_for_bit(undisturbed: Corpus) -> None:
    found = {facts["checkpoint_id"]: state for facts, state in undisturbed.checkpoints()}
    expected = dict(states())
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        assert list(found[name]) == list(state) or set(found[name]) == set(state)
        for key, tensor in state.items():
            assert found[name][key].dtype == tensor.dtype
            assert torch.equal(found[name][key], tensor)


def test_what_cannot_be_used_is_set_aside_with_the_reason_and_never_run(folder: Path, undisturbed: Corpus) -> None:
    reasons = {row["checkpoint_id"]: row["reason"] for row in undisturbed.quarantine.to_pylist()}
    assert reasons.keys() == {"bad/nan", "bad/inf", "bad/cut", "bad/hostile"}
    assert "'weight' holds NaN or infinity" in reasons["bad/nan"]
    assert "'weight' holds NaN or infinity" in reasons["bad/inf"]
    assert "is truncated" in reasons["bad/cut"]
    assert "never executed" in reasons["bad/hostile"]
    assert not (folder / "was-run").exists()
    assert undisturbed.info()["quarantined"] == 4


def test_statistics_are_those_of_all_checkpoints(undisturbed: Corpus) -> None:
    for layout_id in undisturbed.networks:
        facts = undisturbed.query([f"layout_id={layout_id}"])
        states = [undisturbed.state_dict(name) for name in facts.column("checkpoint_id").to_pylist()]
        for name, (mean, std) in undisturbed.moments(layout_id).items():
            values = torch.stack([state[name] for state in states]).double()
            assert mean == pytest.approx(float(values.mean()), abs=1e-6)
            assert std == pytest.approx(float(values.std(unbiased=False)), rel=1e-4)


def test_strict_ends_with_the_first_refused_file(folder: Path, tmp_path: Path) -> None:
    config = BuildConfig(out=str(tmp_path / "c"), sources=[str(folder)], strict=True, distributed=False)
    with pytest.raises(CorpusError, match=r"4 checkpoints were refused, first .*bad/cut.*leave `strict` out"):
        build_corpus(config)
    with pytest.raises(MissingFileError):
        Corpus.open(tmp_path / "c")
    config.strict = False
    assert build_corpus(config).facts.num_rows == NUM_GOOD


def test_again_it_does_nothing_and_other_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    config = BuildConfig(out=str(tmp_path / "c"), sources=[str(folder / "run-1")], distributed=False)
    build_corpus(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    build_corpus(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before
    config.sources = [str(folder / "run-2")]
    with pytest.raises(CorpusError, match=r"already holds a corpus of other sources, or .*; give another folder"):
        build_corpus(config)


def test_nothing_usable_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    config = BuildConfig(out=str(tmp_path / "c"), sources=[str(folder / "bad")], distributed=False)
    with pytest.raises(CorpusError, match="none of the 4 checkpoints can be used"):
        build_corpus(config)
    with pytest.raises(CorpusError, match="nothing to ingest"):
        build_corpus(BuildConfig(out=str(tmp_path / "d")))


def test_facts_of_a_file_are_joined_and_can_be_queried(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "facts.csv"
    table.write_text("path,architecture,test_accuracy,lab\nrun-1/*,wide,0.5,a\nrun-2/*,narrow,0.9,b\n")
    config = BuildConfig(out=str(tmp_path / "c"), sources=[str(folder)], facts=str(table), distributed=False)
    corpus = build_corpus(config)
    assert corpus.query(["lab=a"]).num_rows == NUM_GOOD / 4
    assert set(corpus.query(["test_accuracy>0.6"]).column("architecture").to_pylist()) == {"narrow"}


def ingest(folder: str, out: str) -> None:
    small_units()
    build_corpus(BuildConfig(out=out, sources=[folder], distributed=False))


def test_a_hundred_kills_lose_nothing(folder: Path, tmp_path: Path, undisturbed: Corpus) -> None:
    """A fresh server forks the writers, as a process that has used threads must not be forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raywgen.corpus.build", "tests.corpus.test_ingest"])
    draw = random.Random(0)
    kills, finished, span = 0, 0, 1.0
    while kills < 100:
        out, known = tmp_path / str(finished), set[str]()
        while True:
            writer = context.Process(target=ingest, args=(str(folder), str(out)))
            begin = time.monotonic()
            writer.start()
            writer.join(draw.uniform(0.0, span))
            writer.kill()
            writer.join()
            if writer.exitcode == 0:
                span = min(1.0, time.monotonic() - begin)
                break
            assert writer.exitcode == -signal.SIGKILL
            kills += 1
            kept = {path.name for path in out.glob("units/*.json")}
            if not (out / "manifest.json").exists():
                assert known <= kept, "work that was done is gone"
                # On a machine that has grown slower, writers must live longer to get anywhere.
                span *= 1.0 if known < kept else 1.2
                known = kept
                with pytest.raises(MissingFileError):
                    Corpus.open(out)
            else:
                assert content(Corpus.open(out)) == content(undisturbed), "half a corpus could be seen"
        corpus = Corpus.open(out)
        assert content(corpus) == content(undisturbed)
        assert corpus.quarantine.num_rows == 4
        assert verify_corpus(out) == []
        finished += 1
    assert finished >= 2


def test_leftovers_of_killed_writers_are_removed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    (out / "weights").mkdir(parents=True)
    (out / "weights" / "old-000.arrow.77.partial").write_bytes(b"half")
    corpus = build_corpus(BuildConfig(out=str(out), sources=[str(folder)], distributed=False))
    assert {f"weights/{path.name}" for path in (out / "weights").iterdir()} == {s.path for s in corpus.shards}
    assert not (out / "units").exists()


SCRIPT = """
import sys
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.training.session import ray_session
from tests.corpus.test_ingest import small_units

with ray_session():
    print("begun", flush=True)
    build_corpus(BuildConfig(out=sys.argv[2], sources=[sys.argv[1]]))
"""


@pytest.mark.slow
def test_kills_of_an_ingest_through_ray_lose_nothing(folder: Path, tmp_path: Path, undisturbed: Corpus) -> None:
    out, draw, kills = tmp_path / "c", random.Random(1), 0
    while not (out / "manifest.json").exists():
        command = [sys.executable, "-c", SCRIPT, str(folder), str(out)]
        driver = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"begun\n"
        if kills < 3:
            time.sleep(draw.uniform(0.5, 3.0))
            os.killpg(driver.pid, signal.SIGKILL)
            kills += 1
        driver.communicate()
    assert kills
    assert content(Corpus.open(out)) == content(undisturbed)
    assert verify_corpus(out) == []


@pytest.mark.slow
def test_ray_tasks_write_what_one_process_writes(folder: Path, tmp_path: Path, undisturbed: Corpus) -> None:
    from raywgen.training.session import ray_session

    with ray_session():
        corpus = build_corpus(BuildConfig(out=str(tmp_path / "c"), sources=[str(folder)]))
    # The checksums of all shards and facts among it.
    assert corpus.manifest == undisturbed.manifest
