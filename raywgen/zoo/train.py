"""Trains a zoo over parallel Ray tasks, one stack of networks each, straight into a corpus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raywgen.corpus import Corpus, CorpusError, commit_corpus
from raywgen.corpus.corpus import MANIFEST
from raywgen.corpus.storage import Storage, absolute
from raywgen.zoo.config import ZooConfig
from raywgen.zoo.plan import Stack, plan_zoo
from raywgen.zoo.stacks import TrainedStack, train_stack, write_start

Progress = Callable[[int, int], None]
"""Called with the networks trained and their number."""


def train_zoo(config: ZooConfig, root: str, on_progress: Progress | None = None) -> Corpus:
    """Trains all networks and commits them as a corpus; a corpus of this recipe that is there already is reused.

    Args:
        config: The recipe.
        root: Where the corpus goes, a path or URI that all nodes reach.
        on_progress: Told of every stack that is done.

    Raises:
        CorpusError: `root` holds a corpus of another recipe, or cannot be written.
        TaskError: The config asks for more tasks than there are.
    """
    if (corpus := _existing(config, root)) is not None:
        return corpus
    plan = plan_zoo(config)
    starts = [write_start(start, root) for start in plan.starts]
    trained = _train_all(plan.stacks, config, absolute(root), on_progress)
    recipe: dict[str, Any] = {
        "zoo": config.recipe(),
        "num_diverged": sum(stack.num_diverged for stack in trained),
    }
    return commit_corpus(
        root,
        shards=starts + [stack.shard for stack in trained if stack.shard is not None],
        tasks=plan.tasks,
        networks=[start.network for start in plan.starts],
        recipe=recipe,
    )


def _existing(config: ZooConfig, root: str) -> Corpus | None:
    if Storage.at(root).size(MANIFEST) is None:
        return None
    corpus = Corpus.open(root)
    if corpus.manifest["recipe"].get("zoo") != config.recipe():
        raise CorpusError(f"{root} already holds a corpus of another recipe; give another folder, or delete this one")
    return corpus


def _train_all(stacks: list[Stack], config: ZooConfig, root: str, on_progress: Progress | None) -> list[TrainedStack]:
    """Trains the stacks on whatever CPUs the cluster has; the result is in the order of `stacks`."""
    import ray

    remote = ray.remote(num_cpus=1)(train_stack)
    waiting = {remote.remote(stack, config, root): index for index, stack in enumerate(stacks)}
    total = sum(len(stack.jobs) for stack in stacks)
    trained: dict[int, TrainedStack] = {}
    done = 0
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        index = waiting.pop(ready)
        trained[index] = ray.get(ready)
        done += len(stacks[index].jobs)
        if on_progress is not None:
            on_progress(done, total)
    return [trained[index] for index in range(len(stacks))]
