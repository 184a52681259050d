"""Reads a worker's batches through Ray Data: reader actors fetch the windows of the next steps from an object store.

The data set holds numbers of steps alone. `map_batches` runs them through a reader, which draws the same networks and
windows as the worker (`batch_order.py`), reads only the byte ranges that hold them, and hands over their values in the
order of the steps, a bounded number ahead. It is sent the corpus as the worker has opened it. A reader that dies is
started again by Ray, and what it had not handed over is read again.
"""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from raywgen.config import ConfigError
from raywgen.corpus import CorpusError
from raywgen.training.batch_order import BatchDraw, BatchOrder, StageView, StoredBatch
from raywgen.training.rows import StoredRows
from raywgen.training.run_spec import RunSpec
from raywgen.training.session import quieten_ray_data
from raywgen.weights import WeightsError

if TYPE_CHECKING:
    import ray.data

# Small steps are read several at a time: handing over a block costs some milliseconds, whatever its size.
_BLOCK_BYTES = 8 << 20
_STEPS_OF_A_BLOCK = 16
_BLOCKS_OF_A_SET = 1024
_BLOCKS_AHEAD = 4
_LEAST_STORE_BYTES = 64 << 20
_STEPS_AT_ONCE = 4
# Larger tensors of a stage say nothing about its windows, and are not sent to readers.
_MOST_SENT_VALUES = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlan:
    """All that a reader needs in order to read one worker's batches of a stage.

    Attributes:
        corpus: Path or URI of the corpus, for messages.
        rows: The checkpoints by layout, whose corpus is opened without copies.
        seed: Seed of the order.
        rank: The worker.
        num_workers: Number of workers.
        batch_size: Networks of all workers together.
        view: The `StageView`, by `packed_view`.
    """

    corpus: str
    rows: list[StoredRows]
    seed: int
    rank: int
    num_workers: int
    batch_size: int
    view: bytes

    @classmethod
    def of(cls, order: BatchOrder, corpus: str, batch_size: int, view: bytes) -> ReadPlan:
        """Returns the plan by which a reader reads what a worker's own order would.

        Args:
            order: The worker's order of batches.
            corpus: Path or URI of the corpus.
            batch_size: Networks of all workers together.
            view: The `StageView`, by `packed_view`.
        """
        return cls(
            corpus=corpus,
            rows=[rows.stored() for rows in order.rows],
            seed=order.seed,
            rank=order.rank,
            num_workers=order.num_workers,
            batch_size=batch_size,
            view=view,
        )


class Reader:
    """Reads the batches of some steps; an actor of Ray Data's.

    Args:
        plan: What to read.
    """

    def __init__(self, plan: ReadPlan) -> None:
        torch.set_num_threads(1)
        self._plan = plan
        self._order = BatchOrder(plan.rows, seed=plan.seed, rank=plan.rank, num_workers=plan.num_workers)

    def __call__(self, steps: pa.Table) -> pa.Table:
        """Reads the steps `first` to `first + count - 1`: one row a step, with its tensors, or the reason why not."""
        found = [self._read(range(row["first"], row["first"] + row["count"])) for row in steps.to_pylist()]
        columns = {name: [row[name] for part in found for row in part] for name in ("step", "tensors", "failure")}
        return pa.table(columns, schema=_SCHEMA)

    @cached_property
    def _view(self) -> StageView:
        from ray import cloudpickle

        return cloudpickle.loads(self._plan.view)

    def _read(self, steps: range) -> list[dict[str, Any]]:
        try:
            draws = [self._order.draw(step, self._plan.batch_size, self._view) for step in steps]
            with ThreadPoolExecutor(_STEPS_AT_ONCE) as pool:
                found = pool.map(lambda draw: self._order.read(draw, self._view.stage), draws)
                return [
                    {"step": step, "tensors": _to_bytes(stored), "failure": None}
                    for step, stored in zip(steps, found, strict=True)
                ]
        # As data, so that the worker says this and nothing of how it came to know.
        except (CorpusError, WeightsError) as error:
            failure = str(error)
        except Exception as error:
            traceback.print_exc()
            failure = (
                f"{self._plan.corpus}: a reader failed at steps {steps[0]} to {steps[-1]} ({type(error).__name__}: "
                f"{error}); its log in Ray's session folder says where"
            )
        return [{"step": step, "tensors": None, "failure": failure} for step in steps]


@contextmanager
def ray_reads(
    spec: RunSpec, order: BatchOrder, view: StageView, steps: range, packed: bytes
) -> Iterator[Callable[[BatchDraw], StoredBatch] | None]:
    """Starts a worker's reader, and yields what hands over its batches; yields None where shards are mapped.

    Args:
        spec: The run.
        order: The worker's order of batches.
        view: The stage.
        steps: The steps to read, in order.
        packed: The stage by `packed_view`; empty where shards are mapped.
    """
    if not packed or not steps:
        yield None
        return
    plan = ReadPlan.of(order, spec.config.corpus, view.stage.config.batch_size, packed)
    with RaySource(plan, order, view, steps) as source:
        yield source.read


class RaySource:
    """Hands a worker its part of batch after batch, read ahead by its reader; a context manager.

    Args:
        plan: What to read.
        order: The worker's own order of the same batches.
        view: The stage as the worker has it.
        steps: The steps, in order.
    """

    def __init__(self, plan: ReadPlan, order: BatchOrder, view: StageView, steps: range) -> None:
        self._plan, self._order, self._steps = plan, order, steps
        first = [order.draw(step, plan.batch_size, view) for step in steps[:_STEPS_OF_A_BLOCK]]
        self._step_bytes = max((order.num_bytes(draw) for draw in first), default=1)
        self._rows = self._all_rows()

    def __enter__(self) -> RaySource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Ends the execution, and with it the reader.
        self._rows.close()

    def read(self, draw: BatchDraw) -> StoredBatch:
        """Returns what a part of a batch holds of the corpus; called once for each step, in order.

        Raises:
            CorpusError: The corpus cannot be read, or the readers ended; the message names the shards.
        """
        from ray.exceptions import RayError

        try:
            row = next(self._rows).to_pylist()[0]
        except RayError as error:
            raise self._ended(draw, error) from error
        if row["failure"] is not None:
            raise CorpusError(row["failure"])
        assert row["step"] == draw.step, f"step {row['step']} came in place of {draw.step}"
        return StoredBatch(**safetensors.load(row["tensors"]))

    def _ended(self, draw: BatchDraw, error: Exception) -> CorpusError:
        shards = self._order.shards(draw)
        others = f" and {len(shards) - 1} other shards" if len(shards) > 1 else ""
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return CorpusError(
            f"{self._plan.corpus}: the reader of step {draw.step} ended while it read {shards[0]}{others} ({reason}); "
            "see that nodes have memory left and that Ray's object store has room, or give source=mapped"
        )

    def _all_rows(self) -> Generator[Any, None, None]:
        """Yields a table of one row for each step. One data set follows another: the plan of a long one takes long."""
        per_block = _steps_of_block(self._step_bytes)
        per_set = per_block * _BLOCKS_OF_A_SET
        for first in range(0, len(self._steps), per_set):
            dataset = self._dataset(self._steps[first : first + per_set], per_block)
            yield from dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2)

    def _dataset(self, steps: range, per_block: int) -> ray.data.Dataset:
        import ray.data

        quieten_ray_data()
        parts = [steps[start : start + per_block] for start in range(0, len(steps), per_block)]
        items = [{"first": part[0], "count": len(part)} for part in parts]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Reader,
            fn_constructor_args=(self._plan,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=1),
            # Workers may take every CPU, also later, when a run of a range grows: a reader that waited for a share of
            # one would wait for ever, and its worker with it. It waits for the object store most of the time.
            num_cpus=0,
        )
        context = dataset.context
        context.execution_options.preserve_order = True
        # Blocks stay as the reader makes them: by default Ray Data would join those of many steps.
        context.target_max_block_size = None
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
            object_store_memory=store_bytes(self._step_bytes)
        )
        return dataset


def store_bytes(step_bytes: int) -> int:
    """Returns the bytes of the object store that the batches of one worker may take, given those of a step."""
    return max(_LEAST_STORE_BYTES, _BLOCKS_AHEAD * _steps_of_block(step_bytes) * step_bytes)


def _steps_of_block(step_bytes: int) -> int:
    return max(1, min(_STEPS_OF_A_BLOCK, _BLOCK_BYTES // max(1, step_bytes)))


_SCHEMA = pa.schema([("step", pa.int64()), ("tensors", pa.large_binary()), ("failure", pa.string())])


def _to_bytes(stored: StoredBatch) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in stored._asdict().items() if tensor is not None}
    return safetensors.save(tensors)


def packed_view(view: StageView) -> bytes:
    """Pickles a stage without its weights, for readers, which only ask it for its windows.

    It must be called before an engine takes the stage, whose hooks cannot be sent.

    Raises:
        ConfigError: The stage cannot be pickled.
    """
    from ray import cloudpickle

    class Bare(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, Tensor) and (obj.numel() > _MOST_SENT_VALUES or obj.is_meta):
                return _empty, (obj.shape, obj.dtype, obj.requires_grad if isinstance(obj, nn.Parameter) else None)
            if isinstance(obj, Tensor) and obj.device.type != "cpu":
                return _small, (obj.detach().cpu(), isinstance(obj, nn.Parameter))
            return super().reducer_override(obj)

    content = io.BytesIO()
    try:
        Bare(content).dump(view)
    except Exception as error:  # Pickling calls whatever a class of the user's own defines.
        raise ConfigError(
            f"source=ray: stage '{view.stage.name}' cannot be sent to the readers ({error}); give source=mapped"
        ) from error
    return content.getvalue()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool | None) -> Tensor:
    """Stands for a large tensor; `requires_grad` is None for what is no parameter."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor if requires_grad is None else nn.Parameter(tensor, requires_grad)


def _small(tensor: Tensor, is_parameter: bool) -> Tensor:
    return nn.Parameter(tensor, tensor.is_floating_point()) if is_parameter else tensor
