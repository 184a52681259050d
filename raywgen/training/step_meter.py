"""Measures training steps: values and tokens a second, FLOP utilisation, waiting for input, memory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from raywgen.nn.precision import resolved
from raywgen.training.device_peaks import peak_flops
from raywgen.training.engine import Engine
from raywgen.weights import WeightBatch

_GIB = 1 << 30
_STATUS = Path("/proc/self/status")


class StepMeter:
    """Adds up the steps of a stage from one row of the metric log to the next, as one worker sees them.

    Rates are over all workers. Validation, logging and saving between the steps do not count. The caller ends a step by
    reading its loss, so that no further wait for the device is needed.

    Args:
        engine: The engine that takes the steps.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._device = next(engine.stage.parameters()).device
        self._peak = peak_flops(self._device, resolved(engine.settings.precision, self._device.type))
        self._flops_per_value: dict[str, float] = {}
        self._reset()

    def _reset(self) -> None:
        self._num_steps, self._seconds = 0, 0.0
        self._waited, self._waited_before = 0.0, 0.0
        self._num_values, self._num_tokens, self._flops = 0.0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures a wait for the batch of a step; it is part of the step's time."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def step(self, batch: WeightBatch) -> Iterator[None]:
        """Measures a step on this worker's part of a batch.

        Where the device's peak is known, the operations of a layout's first step are counted, those that activation
        checkpointing does again included. Counting is slow, so that step adds nothing to the rates.
        """
        stage, layout_id = self._engine.stage, batch.layout.id
        num_seen = batch.num_values
        if self._peak is not None and layout_id not in self._flops_per_value:
            self._waited = self._waited_before
            with FlopCounterMode(display=False) as counter, _uncompiled(self._engine.settings.compile):
                yield
            self._flops_per_value[layout_id] = counter.get_total_flops() / num_seen
            return
        begin = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begin
        self._waited_before = self._waited
        scale = stage.config.batch_size / len(batch)
        self._num_steps += 1
        self._num_values += scale * num_seen
        self._num_tokens += scale * stage.num_tokens(batch)
        self._flops += scale * num_seen * self._flops_per_value.get(layout_id, 0.0)

    def figures(self) -> dict[str, float]:
        """Returns the figures of the steps since the last call; without such steps those of memory alone.

        `seconds_per_step`; `values_per_second`, weights that the steps have read; `tokens_per_second` where the stage
        counts tokens; `mfu`, the share of the devices' peak that the steps have used, where the peak is known;
        `input_wait`, the share of the time in which this worker waited for its batches; `anon_gib`, anonymous memory of
        this process; `gpu_peak_gib`, the most that tensors have taken of its GPU.
        """
        figures: dict[str, float] = {}
        if self._num_steps:
            seconds = self._seconds + self._waited
            figures["seconds_per_step"] = seconds / self._num_steps
            figures["values_per_second"] = self._num_values / seconds
            if self._num_tokens:
                figures["tokens_per_second"] = self._num_tokens / seconds
            if self._peak is not None:
                figures["mfu"] = self._flops / seconds / (self._peak * self._engine.num_workers)
            figures["input_wait"] = self._waited / seconds
        self._reset()
        if (memory := anonymous_bytes()) is not None:
            figures["anon_gib"] = memory / _GIB
        if self._device.type == "cuda":
            figures["gpu_peak_gib"] = torch.cuda.max_memory_allocated(self._device) / _GIB
        return figures


def anonymous_bytes() -> int | None:
    """Returns the anonymous memory of this process in bytes; None where the kernel does not report it."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE) if _STATUS.is_file() else None
    return int(found[1]) * 1024 if found else None


def _uncompiled(is_compiled: bool) -> AbstractContextManager[Any]:
    """Runs compiled blocks as they were written: compiled ones hide their operations from a counter."""
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
