"""Compares the batches of both sources, mapped shards and readers of Ray Data, bit for bit over 1 to 3 workers."""

from __future__ import annotations

import torch

from raywgen.corpus import Corpus
from raywgen.generators.bundle import build_generator
from raywgen.training import TrainConfig
from raywgen.training.batch_plan import STAGE_STREAM, BatchPlan, StageView
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.ray_source import RaySource, ReadPlan, packed_view
from raywgen.training.run_moments import rows_with_moments
from raywgen.training.session import ray_session
from raywgen.weights import WeightBatch

_MOST_WORKERS = 3
# A run may go on at any step.
_STEPS = range(5, 13)


def sources_equal(config: TrainConfig) -> float:
    """Returns 1 where both sources gave every worker the same batches of a run's last stage, else 0.

    What windows need beside their values is kept in the run's folder.
    """
    corpus = Corpus.open(config.corpus)
    normalizers, data = measure_normalizers(corpus), data_spec(corpus)
    generator = build_generator(config.method, config.generator, normalizers, data, config.seed)
    stage = generator.stages()[-1]
    rows, unmapped = (
        rows_with_moments(Corpus.open(config.corpus, copies=copies), generator, [stage], config.out).train
        for copies in (True, False)
    )
    view, size = StageView(stage, config.seed, STAGE_STREAM), stage.config.batch_size
    with ray_session():
        for num_workers in range(1, _MOST_WORKERS + 1):
            for rank in range(num_workers):
                plan, remote = (
                    BatchPlan(
                        part,
                        seed=config.seed,
                        num_condition_samples=4,
                        num_query_samples=4,
                        num_targets=generator.needs.num_targets,
                        rank=rank,
                        num_workers=num_workers,
                    )
                    for part in (rows, unmapped)
                )
                read = ReadPlan.of(remote.order, corpus.location, size, packed_view(view))
                with RaySource(read, plan.order, view, _STEPS) as source:
                    for step in _STEPS:
                        found, _ = plan.for_stage(step, size, view, read=source.read)
                        if not _same(found, plan.for_stage(step, size, view)[0]):
                            return 0.0
    return 1.0


def _same(found: WeightBatch, expected: WeightBatch) -> bool:
    assert len(found) > 0
    pairs = [
        (found.values_BD, expected.values_BD),
        (found.targets_BAD, expected.targets_BAD),
        (found.moments_BYK, expected.moments_BYK),
    ]
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
