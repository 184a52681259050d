"""Readers of Ray Data hand every worker the batches that it would read itself."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from raywgen.config import merge_config
from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.tokens import TokenCorpus
from raywgen.generators import Stage, method
from raywgen.generators.bundle import build_generator
from raywgen.training import TrainConfig
from raywgen.training.batch_plan import BatchPlan, StageView
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.encode import EncodePlan
from raywgen.training.ray_source import RaySource, Reader, ReadPlan, packed_view
from raywgen.training.rows import RunRows
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
CASES = ["tokenizer", "prior", "tokens", *SETTINGS]
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
            generator = generator_of(corpus, tokens="auto" if self.tokens else "none", window=3)
            self.stage = generator.stages()[case != "tokenizer"]
        self.view = StageView(self.stage, 0, 2000)
        self.rows = RunRows.of(corpus).train
        if self.tokens is not None:
            self.rows = RunRows.of(corpus).with_tokens(self.tokens).train

    def plan(self, rank: int = 0, num_workers: int = 1) -> BatchPlan:
        return BatchPlan(
            self.rows,
            seed=3,
            num_condition_samples=3,
            num_query_samples=2,
            num_targets=self.stage.needs.num_targets,
            rank=rank,
            num_workers=num_workers,
        )

    def read_plan(self, rank: int = 0, num_workers: int = 1) -> ReadPlan:
        order = self.plan(rank, num_workers).order
        return ReadPlan.of(order, self.corpus.location, self.corpus.snapshot, BATCH_SIZE, packed_view(self.view))

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
    while ray.available_resources()["CPU"] < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "the reader has not ended with its source"
        time.sleep(0.2)


def test_what_a_reader_finds_wrong_is_one_line_that_names_the_shard(
    cluster: None, zoo_corpus: Corpus, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(zoo_corpus.location, tmp_path / "corpus"))
    run = Run("prior", Corpus.open(root))
    for shard in (root / "weights").iterdir():
        shard.unlink()
    with pytest.raises(CorpusError, match=rf"^{root}/weights/[^\n]*\.arrow is missing; restore it[^\n]*$"):
        run.assert_same(range(2))


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
