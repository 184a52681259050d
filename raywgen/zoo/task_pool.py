"""Trains the stacks of a zoo over Ray actors, one CPU each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from raywgen.actor_pool import ActorPool, Item, OnNews, OnShare, PoolConfig, Result

_CONFIG = PoolConfig(
    death_remedy="give Ray fewer CPUs, so that fewer run at once, and run the same command again, which keeps what is "
    "done; or begin anew with a smaller stack_size",
    room_remedy="where memory is short, workers cannot start: free some, or give Ray fewer CPUs, and run the same "
    "command again, which keeps what is done",
)


def run_over_ray(
    work: Callable[[Item, OnShare], Result],
    items: Sequence[Item],
    name_of: Callable[[Item], str],
    on_news: OnNews | None = None,
    on_share: Callable[[int, float], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yields the index and the result of each item as it finishes, on all CPUs of the cluster.

    Args:
        work: Processes an item on one CPU; it may report the share that is done.
        items: All items to process.
        name_of: Returns an item's name.
        on_news: Called with a sentence when a worker died, and when there is no room for any.
        on_share: Called every few seconds with an item's index and the share of it that is done; the share
            returns to 0 when its worker dies.

    Raises:
        ActorsLostError: The workers of an item died again and again, or none started though CPUs were free. All other
            items that had been started were finished first.
        Exception: The error that `work` raises.
    """
    pool = ActorPool(work, _CONFIG, name_of, on_news, on_share)
    try:
        yield from pool.run(items)
    finally:
        pool.shutdown()
