"""Prepares a stage before its first step: initialises it from data, and makes the engine that trains it."""

from __future__ import annotations

import sys

from raywgen.generators import Stage
from raywgen.training.batch_plan import BatchPlan, StageView
from raywgen.training.config import TrainConfig
from raywgen.training.engine import Engine
from raywgen.training.strategy import suited_settings
from raywgen.training.worker_context import WorkerContext

NUM_SETUP_BATCHES = 16


def set_up(stage: Stage, batches: BatchPlan, config: TrainConfig, worker: WorkerContext) -> None:
    """Initialises a stage from its first batches on one worker, as k-means on each would take as long as all."""
    if type(stage).setup is Stage.setup:
        return
    if worker.rank == 0:
        view, size = StageView(stage, config.seed, 0), stage.config.batch_size
        initial = (batches.for_stage(step, size, view, whole=True)[0] for step in range(NUM_SETUP_BATCHES))
        stage.setup(initial, config.seed)
    worker.share([*stage.parameters(), *stage.buffers()])


def make_engine(stage: Stage, batches: BatchPlan, config: TrainConfig, worker: WorkerContext) -> Engine:
    """Returns the engine of a stage, under `strategy=auto` with the settings that suit its sizes.

    Raises:
        StrategyError: The stage does not fit into the worker's memory under any strategy.
    """
    settings = config.engine_settings()
    if config.strategy == "auto":
        view, turns = StageView(stage, config.seed, 0), range(min(batches.num_layouts, NUM_SETUP_BATCHES))
        examples = (batches.for_stage(turn, 1, view, whole=True) for turn in turns)
        memory, can_offload = worker.memory(), worker.device.type == "cuda"
        num_workers = worker.num_workers if config.max_workers else 0
        settings, reason = suited_settings(settings, stage, examples, num_workers, memory, can_offload)
        if worker.rank == 0:
            print(f"strategy of stage '{stage.name}': {reason}", file=sys.stderr, flush=True)
    return worker.engine(stage, settings)
