"""The tokens that a stage of a run learns from: those that the run makes itself, or those of a folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from raywgen.corpus import Corpus
from raywgen.corpus.tokens import TokenCorpus, TokensError, weights_digest
from raywgen.generators import Generator
from raywgen.locations import joined
from raywgen.training.encode import EncodePlan
from raywgen.training.run_spec import RunSpec
from raywgen.training.worker_context import WorkerContext

NONE, AUTO = "none", "auto"
FOLDER = "tokens"
"""The folder, within a run folder, of the tokens that the run makes."""
_POLL_SECONDS = 0.2


def check_tokens(source: str, corpus: Corpus) -> None:
    """Checks, before anything is trained, that the tokens of a folder are those of a corpus.

    Args:
        source: `Stage.tokens`.
        corpus: The corpus of weights.

    Raises:
        TokensError: They are of another corpus, or of an earlier state of it.
        CorpusError: There are none, or they are damaged.
    """
    if source not in (NONE, AUTO):
        TokenCorpus.open(source).check_weights(corpus, weights_digest(corpus))


def stage_tokens(spec: RunSpec, source: str, generator: Generator, worker: WorkerContext) -> TokenCorpus | None:
    """Makes or opens the tokens that a stage learns from; every worker must call it.

    Args:
        spec: The run.
        source: `Stage.tokens`.
        generator: The generator with its trained tokeniser.
        worker: This process.

    Returns:
        The tokens; None where this worker was asked to stop.
    """
    copies = spec.config.source != "ray"
    corpus = Corpus.open(spec.config.corpus, spec.snapshot, copies=copies)
    if source == AUTO:
        tokens = make_tokens(
            spec.config.out,
            corpus,
            generator,
            rank=worker.rank,
            num_workers=worker.num_workers,
            asked_to_stop=worker.stop.asked,
        )
    else:
        tokens = open_tokens(source, corpus, generator)
    if tokens is None or copies:
        return tokens
    return TokenCorpus.open(tokens.location, tokens.corpus.snapshot, copies=False)


def open_tokens(source: str, corpus: Corpus, generator: Generator) -> TokenCorpus:
    """Opens the tokens of a folder, and checks that the generator's tokeniser made them of the corpus.

    Raises:
        TokensError: They are of another tokeniser or corpus.
        CorpusError: There are none, or they are damaged.
    """
    encoder = generator.token_encoder()
    assert encoder is not None, "a stage that learns from tokens has a tokeniser"
    tokens = TokenCorpus.open(source)
    tokens.check_weights(corpus, weights_digest(corpus))
    tokens.check_tokenizer(encoder.digest())
    return tokens


def make_tokens(
    out: str | Path,
    corpus: Corpus,
    generator: Generator,
    *,
    rank: int,
    num_workers: int,
    asked_to_stop: Callable[[], bool],
) -> TokenCorpus | None:
    """Makes the tokens of a run together with its other workers, or finds those of an earlier launch.

    Each worker encodes its share of the shards that are left. The first one waits for all shards and commits them, the
    others wait for that; they need no collective operation, which would fail for lack of time.

    Args:
        out: Run folder, which all workers reach.
        corpus: Its corpus.
        generator: The generator with its trained tokeniser.
        rank: This worker.
        num_workers: Number of workers.
        asked_to_stop: Whether to stop and go on another time.

    Returns:
        The tokens; None where this worker was asked to stop.
    """
    encoder = generator.token_encoder()
    assert encoder is not None, "a stage that learns from tokens has a tokeniser"
    plan = EncodePlan(corpus, encoder, joined(out, FOLDER))
    if (found := _finished(plan)) is not None:
        return found
    remaining = {item.name for item in plan.remaining()}
    for item in plan.items[rank::num_workers]:
        if asked_to_stop():
            return None
        if item.name in remaining:
            plan.encode(item)
    while (found := _finished(plan)) is None:
        if rank == 0 and not plan.remaining():
            return plan.commit()
        if asked_to_stop():
            return None
        time.sleep(_POLL_SECONDS)
    return found


def _finished(plan: EncodePlan) -> TokenCorpus | None:
    """Returns the tokens if they are there; those of an earlier tokeniser are made anew in their place."""
    try:
        return plan.existing()
    except TokensError:
        return None
