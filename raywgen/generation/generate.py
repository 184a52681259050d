"""Generates networks for tasks of a corpus, for a task of the user's own, or for none, as files or a corpus.

Request, plan, executor, sink: each takes what the one before it returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from raywgen.corpus import Corpus
from raywgen.corpus.writing import writing
from raywgen.generation.config import GenerateConfig
from raywgen.generation.early import checked_request, needs_corpus
from raywgen.generation.executor import chosen_device, execute, is_started_here, say_place
from raywgen.generation.fill import TrainedGenerator
from raywgen.generation.judge import ChanceWarning, remedies
from raywgen.generation.loading import load
from raywgen.generation.plan import GenerationPlan, NetworkRow, WorkItem, make_plan
from raywgen.generation.request import ResolvedRequest, resolve_request
from raywgen.generation.sink import Sink
from raywgen.generation.sinks import make_sink
from raywgen.generation.statistics import warn_of_statistics
from raywgen.generation.warn_caller import warn_caller
from raywgen.nn.devices import Device
from raywgen.out_folder import check_room
from raywgen.stops import keeping
from raywgen.tasks.standing import DOUBTFUL
from raywgen.trust import entry_point

OnProgress = Callable[[int, int], None]
"""Called with the number of networks kept so far and the number of all."""


@entry_point
def generate(
    config: GenerateConfig,
    on_progress: OnProgress | None = None,
    on_values: OnProgress | None = None,
    *,
    session: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[NetworkRow]:
    """Generates `num` networks for each task and architecture, as files or a corpus; resumes an interrupted run.

    Files have `networks.json` and the whole config beside them; those of an earlier run that ended are replaced. A
    corpus of the same settings that is there already is reused.

    Args:
        config: Settings of generation.
        on_progress: Called with the number of networks kept so far and the number of all.
        on_values: Called in its place where networks are generated in pieces, with the number of values kept so far and
            the number of all.
        session: Starts or joins Ray, where `config.where` is `ray`; it is entered once there is something to generate,
            or where only the cluster knows if it has GPUs.

    Returns:
        One row per network: path or checkpoint id, task (`""` for none), network, which draw of these it is,
        log-probability; where it was tried loss and accuracy on the examples, chance, the share of the most frequent
        class and what can be said against chance; and test accuracy where the task has a test.

    Raises:
        ConfigError: No such task or architecture, or nothing is known of them that a setting needs.
        ConditionError: Instruction or data do not fit the generator.
        TaskError: An architecture of `networks` cannot be built.
        SamplingError, GuidanceError, ShuffleError: The generator or the tasks do not fit `sampling`.
        DeviceError: A GPU is asked for, and there is none.
        NoMemoryError: There is no memory for a single window of a large network.
        BundleError, CorpusError, WeightsError: A file cannot be read or written.
        OutError: Nothing can or should be written to `out`.
        UnfinishedError: `out` holds part of a run with other settings.
        InUseError: Another process works on `out`.
        NoResourcesError, ActorsLostError: Ray has no room, or actors die again and again.

    Warns:
        UnknownLayoutWarning: The generator was never trained on an architecture of `networks`.
        ChanceWarning: Networks answer their labelled samples no better than chance.
        StatisticsWarning: Files of networks that were not run have generated statistics of batch normalisation.
    """
    config = checked_request(config)
    corpus = Corpus.open(config.corpus) if needs_corpus(config) else None
    # Over Ray only the actors generate.
    trained = load(config.generator, device="cpu" if config.where == "ray" else config.device)
    if corpus is not None:
        corpus.arrange(trained.generator.layouts)
    sampling = trained.generator.resolve_sampling(config.sampling)
    request = resolve_request(config, corpus, trained)
    asks_cluster = config.where == "ray" and config.device != "cpu" and not is_started_here()
    with session() if asks_cluster else nullcontext():
        chosen = replace(config, device=chosen_device(config))
        plan = make_plan(chosen, request, sampling, trained.generator)
        work = _Work(chosen, plan, trained, make_sink(chosen, plan), asked=config.device, session=session)
        return _generate(work, on_progress, on_values)


class _Work(NamedTuple):
    """The work of a request: `config` has the chosen device, and `asked` is the one that was asked for."""

    config: GenerateConfig
    plan: GenerationPlan
    trained: TrainedGenerator
    sink: Sink
    asked: Device
    session: Callable[[], AbstractContextManager[None]]


def _generate(work: _Work, on_progress: OnProgress | None, on_values: OnProgress | None) -> list[NetworkRow]:
    config, plan, trained, request = work.config, work.plan, work.trained, work.plan.request
    kept = keeping(f"{config.out} keeps the networks that are written; the same command goes on with the others")
    with kept, writing(config.out):
        existing = work.sink.existing()
        rows = _run(work, _reports(plan, on_progress, on_values)) if existing is None else existing
    if existing is not None:
        num = "the network" if len(rows) == 1 else f"all {len(rows):,} networks"
        print(f"{config.out}: {num} of these settings are there already", file=sys.stderr, flush=True)
    else:
        _warn_of_unknown(request, rows, trained)
        _warn_of_statistics(request, rows)
    _warn_of_chance(request, rows, trained)
    return rows


def _reports(
    plan: GenerationPlan, on_progress: OnProgress | None, on_values: OnProgress | None
) -> Callable[[Collection[WorkItem]], None]:
    """Returns what reports progress, given the work items that are left."""
    counts_values = plan.has_pieces and on_values is not None
    call = on_values if counts_values else on_progress

    def amount(items: Iterable[WorkItem]) -> int:
        if counts_values:
            return sum(plan.num_values(item) for item in items)
        # Networks in pieces count when all their pieces are there.
        return sum(each[2] - each[1] for each in {item.networks for item in items})

    def report(left: Collection[WorkItem]) -> None:
        if call is not None:
            total = amount(plan.items)
            call(total - amount(left), total)

    return report


def _run(work: _Work, report: Callable[[Collection[WorkItem]], None]) -> list[NetworkRow]:
    """Does the work items that are pending and writes each result as it comes."""
    config, sink = work.config, work.sink
    pending = sink.pending()
    left = {item.index: item for item in pending}
    report(left.values())
    if pending:
        check_room(config.out, work.plan.num_bytes)
        say_place(config, work.asked)
        with work.session() if config.where == "ray" else nullcontext():
            for result in execute(config, work.plan, pending, work.trained, sink.kept):
                sink.write(result)
                del left[result.item.index]
                report(left.values())
    return sink.finish()


def _warn_of_unknown(request: ResolvedRequest, rows: list[NetworkRow], trained: TrainedGenerator) -> None:
    for network in request.networks:
        row = next((row for row in rows if row.network == network.name), None)
        if row is not None and not row.known:
            trained.warn(network.layout)


def _warn_of_statistics(request: ResolvedRequest, rows: list[NetworkRow]) -> None:
    for network in request.networks:
        row = next((row for row in rows if row.network == network.name and row.path), None)
        if row is not None and not request.is_tried:
            warn_of_statistics(network, row.path)


def _warn_of_chance(request: ResolvedRequest, rows: list[NetworkRow], trained: TrainedGenerator) -> None:
    for network in request.networks:
        tried = [row for row in rows if row.network == network.name and row.against_chance]
        doubtful = [row for row in tried if row.against_chance in DOUBTFUL]
        if not doubtful:
            continue
        accuracy = fmean(row.example_accuracy or 0.0 for row in doubtful)
        chance = fmean(row.chance or 0.0 for row in doubtful)
        linear = [row.linear for row in doubtful if row.linear is not None]
        than = f", a linear classifier of the samples {fmean(linear):.2f}" if linear else ""
        remedy = remedies(trained.generator, request.best_of, is_known=doubtful[0].known)
        warn_caller(
            f"{network.name}: {len(doubtful)} of {len(tried)} networks answer the labelled samples no better than "
            f"chance or than a linear classifier (accuracy {accuracy:.2f}, chance {chance:.2f}{than}, means over "
            f"them); for better ones {remedy}",
            ChanceWarning,
        )
