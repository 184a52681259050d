"""Trains a zoo over all cores and nodes into a corpus; an interrupted zoo continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

from raywgen.actor_pool import OnNews, OnShare, paced
from raywgen.corpus import Corpus, CorpusError, NetworkFacts, Shard, commit_corpus
from raywgen.corpus.ingest import journal
from raywgen.corpus.manifest import MANIFEST
from raywgen.corpus.statistics import LayoutStatistics, Statistics, add_statistics
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.writing import JOURNALS, writing
from raywgen.locations import absolute
from raywgen.out_folder import check_room, checked_out
from raywgen.sealed import SealError, sealed_json, unseal
from raywgen.stops import keeping
from raywgen.tasks.train_loop import Execution
from raywgen.trust import entry_point
from raywgen.weights import Layout
from raywgen.zoo.config import ZooConfig
from raywgen.zoo.execution import choose_executions
from raywgen.zoo.plan import ZooPlan, ZooStack, plan_zoo, zoo_bytes
from raywgen.zoo.stacks import TrainedStack, train_stack, write_start
from raywgen.zoo.task_pool import run_over_ray

OnProgress = Callable[[int, int], None]
"""Called with the optimiser steps so far and in total, summed over all networks; with those of meta starts before."""
Session = Callable[[], AbstractContextManager[None]]
_PLAN = f"{JOURNALS}/zoo.json"


@entry_point
def train_zoo(
    config: ZooConfig,
    root: str,
    on_progress: OnProgress | None = None,
    on_news: OnNews | None = None,
    *,
    distributed: bool = True,
    session: Session = nullcontext,
) -> Corpus:
    """Trains all networks and commits them as a corpus; an existing corpus of this recipe is reused.

    Args:
        config: The recipe.
        root: Folder of the corpus, a path or URI that all nodes reach.
        on_progress: Called every few seconds and after every stack.
        on_news: Called with sentences: the execution of each network if `config.execution` is `auto`, that a meta start
            is trained, and lost workers.
        distributed: Whether to train over Ray actors; else training runs in this process.
        session: Starts Ray for these actors; it is entered once the tasks and networks are found, as that takes long.

    Raises:
        OutError: Nothing can or should be written to `root`, or its disk has no room for the checkpoints.
        CorpusError: `root` holds a corpus of another recipe, or cannot be written.
        TaskError: The config asks for more tasks than there are.
        InUseError: Another process works on `root`.
        ActorsLostError: Workers die again and again, or do not start; the same command continues with the rest.
    """
    root = checked_out(root, ZooConfig.out)
    if (corpus := _existing(config, root)) is not None:
        return corpus
    kept = keeping(f"{root} keeps the networks that are trained; the same command goes on with the others")
    with kept, writing(root):
        # Another process that held the folder a moment ago may have finished the corpus.
        corpus = _existing(config, root)
        if corpus is not None:
            return corpus
        return _train(config, root, on_progress, on_news, session if distributed else None)


def _train(
    config: ZooConfig, root: str, on_progress: OnProgress | None, on_news: OnNews | None, session: Session | None
) -> Corpus:
    check_room(root, zoo_bytes(config))
    storage = CorpusStorage.at(root)
    executions = _executions(config, storage, on_news)
    plan = _plan(config, executions, on_progress, on_news)
    starts = [] if config.start == "own" else [write_start(start, root) for start in plan.starts]
    with session() if session is not None else nullcontext():
        is_distributed = session is not None
        trained = _train_all(plan.stacks, config, absolute(root), storage, on_progress, on_news, is_distributed)
    corpus = _commit(plan, config, root, executions, starts, trained)
    storage.delete(JOURNALS)
    return corpus


def _plan(
    config: ZooConfig, executions: dict[str, Execution], on_progress: OnProgress | None, on_news: OnNews | None
) -> ZooPlan:
    total = config.branch_steps * len(config.networks)

    def report(share: float) -> None:
        if on_progress is not None:
            on_progress(round(share * total), total)

    if config.start == "meta" and on_news is not None:
        on_news(f"start=meta: {total} steps by the loss of all seen tasks come before the networks")
    return plan_zoo(config, executions, paced(report))


def _existing(config: ZooConfig, root: str) -> Corpus | None:
    if CorpusStorage.at(root).size(MANIFEST) is None:
        return None
    corpus = Corpus.open(root)
    if corpus.manifest["recipe"].get("zoo") != config.recipe():
        raise CorpusError(f"{root} already holds a corpus of another recipe; give another folder, or delete this one")
    return corpus


def _executions(config: ZooConfig, storage: CorpusStorage, on_news: OnNews | None) -> dict[str, Execution]:
    """Returns the execution of each network by name. It is stored, because an interrupted zoo must continue alike."""
    kept = _read_state(storage, _PLAN) if storage.size(_PLAN) is not None else {}
    # Stored as JSON, in which tuples become lists.
    recipe = json.loads(json.dumps(config.recipe()))
    recipe["stack_size"] = config.stack_size
    if kept and kept["zoo"] != recipe:
        raise CorpusError(
            f"{storage.name} holds an unfinished zoo of another recipe; give another folder, or delete this one"
        )
    if kept:
        return kept["executions"]
    executions = choose_executions(config, on_news) if config.execution == "auto" else {}
    storage.write(_PLAN, sealed_json({"zoo": recipe, "executions": executions}).encode())
    return executions


def _train_all(
    stacks: list[ZooStack],
    config: ZooConfig,
    root: str,
    storage: CorpusStorage,
    on_progress: OnProgress | None,
    on_news: OnNews | None,
    distributed: bool,
) -> list[TrainedStack]:
    """Trains the stacks that are pending and returns all results in the order of `stacks`."""
    journals = set(storage.list(JOURNALS))
    trained = {
        index: _from_json(_read_state(storage, journal(stack.name)))
        for index, stack in enumerate(stacks)
        if f"{stack.name}.json" in journals
    }
    pending = [index for index in range(len(stacks)) if index not in trained]
    shares = {index: float(index in trained) for index in range(len(stacks))}

    def report(index: int, share: float) -> None:
        shares[index] = share
        if on_progress is not None:
            steps = [len(stack.trajectories) * config.num_steps for stack in stacks]
            on_progress(round(sum(steps[place] * shares[place] for place in shares)), sum(steps))

    items = [stacks[index] for index in pending]
    work = partial(train_and_record, config=config, root=root)
    if distributed:
        results = run_over_ray(
            work, items, lambda stack: stack.name, on_news, lambda item, share: report(pending[item], share)
        )
    else:
        here = (work(stack, paced(partial(report, index))) for index, stack in zip(pending, items, strict=True))
        results = enumerate(here)
    for item, result in results:
        trained[pending[item]] = result
        report(pending[item], 1.0)
    return [trained[index] for index in range(len(stacks))]


def train_and_record(stack: ZooStack, on_share: OnShare, config: ZooConfig, root: str) -> TrainedStack:
    """Trains a stack, then writes its journal in one step."""
    trained = train_stack(stack, config, root, lambda done, total: on_share(done / total))
    CorpusStorage.at(root).write(journal(stack.name), sealed_json(_to_json(trained)).encode())
    return trained


def _commit(
    plan: ZooPlan,
    config: ZooConfig,
    root: str,
    executions: dict[str, Execution],
    starts: list[Shard],
    trained: list[TrainedStack],
) -> Corpus:
    shards = starts + [stack.shard for stack in trained if stack.shard is not None]
    shards += [stack.optimizer_shard for stack in trained if stack.optimizer_shard is not None]
    if not any(stack.shard for stack in trained):
        raise CorpusError(f"{root}: every network diverged; lower the learning rate")
    statistics: Statistics = {}
    for stack in trained:
        if stack.shard is not None and stack.statistics is not None:
            key = stack.shard.layout_id, stack.shard.facts[0]["split"]
            add_statistics(statistics, key, stack.statistics)
    kept = {stack.optimizer_layout.id: stack.optimizer_layout for stack in trained if stack.optimizer_layout}
    networks = [start.network for start in plan.starts]
    networks += [NetworkFacts(name=f"optimizer-{key[:6]}", recipe={}, layout=layout) for key, layout in kept.items()]
    lost = [name for stack in trained for name in stack.diverged]
    return commit_corpus(
        root,
        shards=shards,
        tasks=plan.tasks,
        networks=networks,
        recipe={
            "zoo": config.recipe(),
            "stack_size": config.stack_size,
            "executions": executions,
            "num_diverged": len(lost),
        },
        quarantine=[{"checkpoint_id": name, "file": "", "reason": "diverged: not finite"} for name in lost],
        statistics=statistics,
    )


def _read_state(storage: CorpusStorage, name: str) -> dict[str, Any]:
    try:
        return unseal(storage.read(name))
    except SealError as error:
        raise CorpusError(
            f"{storage.name}/{name} is damaged ({error}); delete it and run the same command, which does again what it "
            "stood for"
        ) from error


def _to_json(trained: TrainedStack) -> dict[str, object]:
    return {
        "shard": None if trained.shard is None else asdict(trained.shard),
        "optimizer_shard": None if trained.optimizer_shard is None else asdict(trained.optimizer_shard),
        "optimizer_layout": None if trained.optimizer_layout is None else trained.optimizer_layout.to_json(),
        "statistics": None if trained.statistics is None else trained.statistics.to_json(),
        "diverged": list(trained.diverged),
    }


def _from_json(content: dict[str, Any]) -> TrainedStack:
    layout, statistics = content["optimizer_layout"], content["statistics"]
    return TrainedStack(
        shard=None if content["shard"] is None else Shard(**content["shard"]),
        optimizer_shard=None if content["optimizer_shard"] is None else Shard(**content["optimizer_shard"]),
        optimizer_layout=None if layout is None else Layout.from_json(layout),
        statistics=None if statistics is None else LayoutStatistics.from_json(statistics),
        diverged=tuple(content["diverged"]),
    )
