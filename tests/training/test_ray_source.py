"""Readers of Ray Data hand every worker the batches that it would read itself."""

from __future__ import annotations

import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
import torch
from torch import Tensor

from raywgen.config import merge_config
from raywgen.corpus import Corpus, CorpusError, commit_corpus
from raywgen.corpus.commit import stored_shards
from raywgen.corpus.tokens import TokenCorpus
from raywgen.generators import Stage, method
from raywgen.generators.bundle import build_generator
from raywgen.training import TrainConfig
from raywgen.training.batch_plan import BatchPlan, StageView
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.encode import EncodePlan
from raywgen.training.ray_source import RaySource, Reader, ReadPlan, packed_view
from raywgen.training.rows import LayoutRows
from raywgen.training.run_moments import rows_with_moments
from raywgen.training.session import ray_session
from raywgen.training.source import with_source
from raywgen.weights import WeightBatch
from tests.training.test_encode import generator_of

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORK = {"kind": "chunks", "width": 16, "num_layers": 1, "num_heads": 2, "chunk_length": 8, "window": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "mcdi": {"network": NETWORK, "diffusion": {"num_targets": 2}},
    "lohp": {"network": NETWORK, "path": {"num_steps": 4, "length": 2}, "sampling": {"num_steps": 2}},
    "hypernetwork": {},
}
CASES = ["tokenizer", "prior", "tokens", "tokenizer-tensor", "prior-filter", *SETTINGS]
BATCH_SIZE = 7


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def tokens(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    encoder = generator_of(zoo_corpus).token_encoder()
    assert encoder is not None
    plan = EncodePlan(zoo_corpus, encoder, str(tmp_path_factory.mktemp("tokens")))
    for item in plan.items:
        plan.encode(item)
    return plan.commit()


class Run:
    """One stage over a corpus: its batches as workers read them themselves, and by readers."""

    def __init__(self, case: str, corpus: Corpus, tokens: TokenCorpus | None = None) -> None:
        self.corpus = corpus
        self.tokens = tokens if case == "tokens" else None
        if case in SETTINGS:
            config = merge_config(method(case).Config, [(case, SETTINGS[case])])
            generator = build_generator(case, config, measure_normalizers(corpus), data_spec(corpus), 0)
            self.stage: Stage = generator.stages()[0]
        else:
            stage, _, scales = case.partition("-")
            settings = {"scales": scales} if scales else {}
            generator = generator_of(corpus, 3, "auto" if self.tokens else "none", **settings)
            generator.tokenizer.config.window = 3
            self.stage = generator.stages()[stage != "tokenizer"]
        self.generator = generator
        self.view = StageView(self.stage, 0, 2000)
        self.rows, self.unmapped = (self._rows(copies=copies) for copies in (True, False))

    def _rows(self, *, copies: bool) -> list[LayoutRows]:
        corpus = Corpus.open(self.corpus.location, copies=copies)
        rows = rows_with_moments(corpus, self.generator, [self.stage], f"{self.corpus.location}-moments")
        if self.tokens is not None:
            rows = rows.with_tokens(TokenCorpus.open(self.tokens.location, copies=copies))
        return rows.train

    def plan(self, rank: int = 0, num_workers: int = 1, *, is_mapped: bool = True) -> BatchPlan:
        return BatchPlan(
            self.rows if is_mapped else self.unmapped,
            seed=3,
            num_condition_samples=3,
            num_query_samples=2,
            num_targets=self.stage.needs.num_targets,
            rank=rank,
            num_workers=num_workers,
        )

    def read_plan(self, rank: int = 0, num_workers: int = 1) -> ReadPlan:
        """The plan as it comes to a reader."""
        order = self.plan(rank, num_workers, is_mapped=False).order
        plan = ReadPlan.of(order, self.corpus.location, BATCH_SIZE, packed_view(self.view))
        return pickle.loads(pickle.dumps(plan))

    def source(self, steps: range, rank: int = 0, num_workers: int = 1) -> RaySource:
        order = self.plan(rank, num_workers).order
        return RaySource(self.read_plan(rank, num_workers), order, self.view, steps)

    def assert_same(self, steps: range, rank: int = 0, num_workers: int = 1) -> None:
        """Looks whether batches that came from readers are those that this worker reads itself, to the last bit."""
        plan = self.plan(rank, num_workers)
        with self.source(steps, rank, num_workers) as source:
            for step in steps:
                found, noise = plan.for_stage(step, BATCH_SIZE, self.view, read=source.read)
                expected, same_noise = plan.for_stage(step, BATCH_SIZE, self.view)
                assert same(found, expected)
                assert torch.equal(noise.uniform(3), same_noise.uniform(3))


def same(found: WeightBatch, expected: WeightBatch) -> bool:
    def tensors(batch: WeightBatch) -> list[Tensor | None]:
        first_B = None if batch.windows is None else batch.windows.first_B
        condition = batch.condition
        return [
            batch.values_BD,
            batch.targets_BAD,
            batch.codes_BWL,
            batch.moments_BYK,
            first_B,
            condition.samples_BSF,
            condition.labels_BS,
            batch.sample_index_B,
        ]

    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_a_reader_reads_what_a_worker_reads(case: str, zoo_corpus: Corpus, tokens: TokenCorpus) -> None:
    """The same code as in an actor of Ray's, in this process."""
    run = Run(case, zoo_corpus, tokens)
    for num_workers in (1, 3):
        for rank in range(num_workers):
            plan, reader = run.plan(rank, num_workers), Reader(run.read_plan(rank, num_workers))
            for step in range(4):
                draw = plan.order.draw(step, BATCH_SIZE, run.view)
                own = reader._order.draw(step, BATCH_SIZE, reader._view)
                stored = reader._order.read(own, reader._view.stage)
                found, _ = plan.for_stage(step, BATCH_SIZE, run.view, read=lambda _, stored=stored: stored)
                assert same(found, plan.for_stage(step, BATCH_SIZE, run.view)[0])
                assert torch.equal(own.row_B, draw.row_B)
                assert (own.windows is None) == (draw.windows is None)
                if own.windows is not None and draw.windows is not None:
                    assert torch.equal(own.windows.first_B, draw.windows.first_B)


def test_both_sources_give_the_same_batches(cluster: None, zoo_corpus: Corpus) -> None:
    run = Run("lohp", zoo_corpus)
    run.assert_same(range(11, 50), rank=1, num_workers=2)
    deadline = time.monotonic() + 60
    while readers():
        assert time.monotonic() < deadline, "the reader has not ended with its source"
        time.sleep(0.2)


class Worker:
    def place(self) -> str:
        return ray.get_runtime_context().get_node_id()


def test_readers_start_where_workers_hold_every_cpu(cluster: None, zoo_corpus: Corpus) -> None:
    """As those of a range do, which has as many as there is room for."""

    worker: Any = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Worker).remote()
    ray.get(worker.place.remote())
    gives_up = threading.Timer(300, ray.kill, [worker])  # A reader that waits for a CPU would otherwise wait for ever.
    gives_up.start()
    try:
        Run("lohp", zoo_corpus).assert_same(range(4))
        assert ray.get(worker.place.remote()), "readers waited for the worker's end"
    finally:
        gives_up.cancel()
        ray.kill(worker)


LOST = r"/weights/[^\n]*\.arrow is missing; restore it[^\n]*$"


def test_a_lost_shard_is_one_line_in_both_sources(cluster: None, zoo_corpus: Corpus, tmp_path: Path) -> None:
    root = Path(shutil.copytree(zoo_corpus.location, tmp_path / "corpus"))
    run = Run("prior", Corpus.open(root))
    shutil.rmtree(root / "weights")
    with pytest.raises(CorpusError, match=f"^{root}{LOST}"):
        run.plan().for_stage(0, BATCH_SIZE, run.view)
    with run.source(range(2)) as source, pytest.raises(CorpusError, match=f"^{root}{LOST}"):
        run.plan().for_stage(0, BATCH_SIZE, run.view, read=source.read)


def test_what_goes_wrong_in_a_reader_is_said_with_its_steps_or_shards(zoo_corpus: Corpus) -> None:
    run = Run("prior", zoo_corpus)
    reader = Reader(run.read_plan())
    reader._order.rows = []
    (row,) = reader(pa.table({"first": [4], "count": [1]})).to_pylist()
    assert (row["step"], row["tensors"]) == (4, None)
    assert row["failure"].startswith(f"{zoo_corpus.location}: a reader failed at steps 4 to 4 (ZeroDivisionError: ")
    source, draw = run.source(range(8)), run.plan().order.draw(5, BATCH_SIZE, run.view)
    (first, *_) = run.plan().order.shards(draw)
    said = str(source._ended(draw, RuntimeError("The actor died.\nIts node is gone.")))
    assert f"the reader of step 5 ended while it read {first} (The actor died.); see that nodes have memory" in said


def test_a_corpus_that_grows_is_read_on_as_it_was(zoo_corpus: Corpus, tmp_path: Path) -> None:
    """A reader that starts after the corpus has grown, as that of a later stage, reads the run's own checkpoints."""
    root = Path(shutil.copytree(zoo_corpus.location, tmp_path / "corpus"))
    run = Run("mcdi", Corpus.open(root))
    plan = run.read_plan()
    commit_corpus(
        str(root),
        shards=stored_shards(run.corpus)[1:],
        tasks=list(run.corpus.tasks.values()),
        networks=list(run.corpus.networks.values()),
        recipe={},
        forms=run.corpus.forms,
    )
    assert Corpus.open(root).snapshot != run.corpus.snapshot
    reader = Reader(plan)
    for step in range(4):
        stored = reader._order.read(reader._order.draw(step, BATCH_SIZE, reader._view), reader._view.stage)
        found, _ = run.plan().for_stage(step, BATCH_SIZE, run.view, read=lambda _, stored=stored: stored)
        assert same(found, run.plan().for_stage(step, BATCH_SIZE, run.view)[0])


@pytest.mark.slow
def test_a_reader_that_is_killed_is_started_again(cluster: None, zoo_corpus: Corpus) -> None:
    run = Run("prior", zoo_corpus)
    source, plan = run.source(range(60)), run.plan()
    with source:
        for step in range(60):
            found, _ = plan.for_stage(step, BATCH_SIZE, run.view, read=source.read)
            assert same(found, plan.for_stage(step, BATCH_SIZE, run.view)[0])
            if step == 3:
                kill_readers()


def readers() -> list[psutil.Process]:
    """Returns the processes of this session's readers."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # It may end meanwhile.
            found += [child] * ("MapWorker" in " ".join(child.cmdline()))
    return found


def kill_readers() -> None:
    """Ends the processes of this session's readers."""
    found = readers()
    assert found
    for child in found:
        child.kill()


def test_the_source_is_chosen_by_the_place_of_the_corpus(bucket: str, capfd: pytest.CaptureFixture[str]) -> None:
    def chosen(**settings: Any) -> str:
        return with_source(TrainConfig(**settings)).source

    assert chosen(corpus="runs/zoo", num_workers=2) == "mapped"
    assert chosen(corpus="runs/zoo", num_workers=2, source="ray") == "ray"
    assert capfd.readouterr().err == ""
    assert chosen(corpus=f"{bucket}/zoo", num_workers=[1, 2]) == "ray"
    assert "reads s3://bucket/zoo through Ray Data (source=ray): shards on an object store" in capfd.readouterr().err
    assert chosen(corpus=f"{bucket}/zoo", num_workers=0) == "mapped"
    assert "from copies on this machine (source=mapped): num_workers=0 has no readers" in capfd.readouterr().err
    assert chosen(corpus=f"{bucket}/zoo", num_workers=2, source="mapped") == "mapped"
    with pytest.raises(
        ValueError, match="source=ray: the readers serve Ray's workers, and num_workers=0 has none; giv"
    ):
        TrainConfig(num_workers=0, source="ray")
