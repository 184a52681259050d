"""Compares steps of a prior on stored tokens with steps that encode windows of weights, batch by batch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from raywgen.corpus import Corpus
from raywgen.generators import Stage
from raywgen.generators.bundle import load_bundle
from raywgen.generators.igpg import IGPGConfig
from raywgen.training import TrainConfig
from raywgen.training.batch_plan import STAGE_STREAM, BatchPlan, StageView
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.encode_corpus import EncodeConfig, encode_corpus
from raywgen.training.engine import LocalEngine
from raywgen.training.rows import RunRows
from raywgen.training.run_spec import RunSpec

_WARM_UP = 2


def token_figures(run: TrainConfig, corpus: Corpus, bundle: Path, tokens: Path, num_steps: int) -> dict[str, float]:
    """Encodes a corpus, and takes steps on weights and on tokens in turns; their losses must be equal.

    Args:
        run: A run of IGPG.
        corpus: Its corpus.
        bundle: Bundle of its tokeniser.
        tokens: Folder of the corpus of tokens.
        num_steps: Pairs of steps.
    """
    encoded = encode_corpus(EncodeConfig(corpus=corpus.location, tokenizer=str(bundle), out=str(tokens), where="here"))
    assert isinstance(run.generator, IGPGConfig)
    run = replace(run, generator=replace(run.generator, prior=replace(run.generator.prior, tokens=str(tokens))))
    rows = RunRows.of(corpus)
    sides = [_Side(run, corpus, bundle, each) for each in (rows, rows.with_tokens(encoded))]
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(num_steps):
        losses = []
        for side, seconds in zip(sides, times, strict=True):
            begin = time.perf_counter()
            losses.append(side.step(step))
            seconds.append(time.perf_counter() - begin)
        assert losses[0] == losses[1], f"step {step}: {losses[0]} from weights, {losses[1]} from tokens"
    stored, coded = (sum(shard.num_bytes for shard in each.shards) for each in (corpus, encoded.corpus))
    on_weights, on_tokens = (median(seconds[_WARM_UP:]) for seconds in times)
    return {"token_speedup": on_weights / on_tokens, "token_ratio": stored / coded}


class _Side:
    """A prior that is trained on some rows."""

    def __init__(self, run: TrainConfig, corpus: Corpus, bundle: Path, rows: RunRows) -> None:
        spec = RunSpec(config=run, metadata={}, normalizers=measure_normalizers(corpus), data=data_spec(corpus))
        generator = spec.build()
        generator.load_state_dict(load_bundle(bundle).state_dict())
        self._stage: Stage = generator.stages()[-1]
        self._engine = LocalEngine(self._stage)
        self._plan = BatchPlan(rows.train, seed=run.seed, num_condition_samples=4, num_query_samples=4)
        self._view = StageView(self._stage, run.seed, STAGE_STREAM)

    def step(self, step: int) -> float:
        size = self._stage.config.batch_size
        batch, noise = self._plan.for_stage(step, size, self._view)
        return float(self._engine.train_step(batch, noise, 1e-3, size)["loss"])
