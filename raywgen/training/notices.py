"""Notices that Ray gives of nodes which will be taken away soon, such as spot instances."""

from __future__ import annotations

import threading
from contextlib import suppress

from raywgen.training.workers_log import add_trouble

NOTICE = "was to be taken away"
"""Is in the reason of a notice in a run's history."""
_SECONDS = 5.0


class Notices:
    """Asks Ray for a notice every few seconds, in a thread: the question is a barrier of all workers.

    Args:
        out: Run folder in whose history a notice is kept; empty on all workers but one.
    """

    def __init__(self, out: str) -> None:
        self.came = False
        self._out = out
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import ray.train

        over = threading.Event()
        with suppress(Exception):  # Other workers are gone, and training will say so.
            while not over.wait(_SECONDS):
                if (info := ray.train.get_preemption_info()) is not None:
                    self.came = True
                    if self._out:
                        ranks = ", ".join(map(str, info.preempted_ranks))
                        add_trouble(self._out, f"the node of rank {ranks} {NOTICE}")
                    return
