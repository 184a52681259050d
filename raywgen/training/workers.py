"""Starts the workers of a launch: this process alone, or Ray Train workers."""

from __future__ import annotations

import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raywgen.compat import worker_log
from raywgen.generators import Stage
from raywgen.locations import absolute
from raywgen.nn.devices import resolved_device
from raywgen.nn.memory import free_memory
from raywgen.stops import Stop
from raywgen.storage import Storage
from raywgen.training.agreement import check_agreement, exchange, share
from raywgen.training.checkpoints import CheckpointWarning
from raywgen.training.engine import Engine, EngineSettings, LocalEngine, distributed_engine
from raywgen.training.notices import Notices
from raywgen.training.room import alive_nodes, ask_autoscaler, await_room, remedy
from raywgen.training.run_folder import warn
from raywgen.training.run_spec import RunSpec
from raywgen.training.stop_file import StopFile
from raywgen.training.strategy import DoesNotFitError
from raywgen.training.trainer import train_runs
from raywgen.trust import trusted, trusting

if TYPE_CHECKING:
    from ray.train import Result
    from ray.train.torch import TorchTrainer

_RAY = "ray_train"
_POLL_SECONDS = 0.5
_LATER_SECONDS = 30.0
_BLAME_SECONDS = 3.0


class TrainingError(RuntimeError):
    """Workers failed more often than `max_failures` allows; the message holds the first one's reason."""


class LocalContext:
    """This process, which trains alone.

    Args:
        stop: Tells whether to stop.
        device: The device to train on.
    """

    rank, num_workers = 0, 1

    def __init__(self, stop: Stop, device: torch.device) -> None:
        self.stop = stop
        self.device = device

    def engine(self, stage: Stage, settings: EngineSettings) -> Engine:
        """Returns an engine of plain torch."""
        return LocalEngine(stage, settings)

    def memory(self) -> int:
        """Returns the free bytes of this process' device."""
        return free_memory(self.device)

    def is_warned(self) -> bool:
        """Returns False: nobody warns of the end of this machine but by a signal."""
        return False

    def place(self) -> str:
        """Returns node and process."""
        return f"node {socket.gethostname()}, process {os.getpid()}"

    def exchange(self, text: str) -> list[str]:
        """Returns the text: there is no other worker."""
        return [text]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Does nothing: there is no other worker."""

    def check_agreement(self, parts: Mapping[str, str]) -> None:
        """Does nothing: there is no other worker."""


class RayContext:
    """One worker of Ray Train.

    Args:
        out: Run folder in which the launching process asks to stop.
    """

    def __init__(self, out: str) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self._num_local = context.get_local_world_size()
        self.stop = StopFile(out)
        self._notices = Notices(out if self.rank == 0 else "")
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(1)
            # DeepSpeed would take a GPU of the node, also where the run has asked for none.
            os.environ["DS_ACCELERATOR"] = "cpu"
        else:
            # DeepSpeed takes the GPU of this number, and Ray may have given this worker another than its local rank.
            torch.cuda.set_device(self.device)
            os.environ["LOCAL_RANK"] = str(self.device.index or 0)

    def engine(self, stage: Stage, settings: EngineSettings) -> Engine:
        """Returns an engine over all workers."""
        return distributed_engine(stage, self.num_workers, settings)

    def memory(self) -> int:
        """Returns the free bytes of the device of the worker that has the least."""
        free = torch.tensor(free_memory(self.device, self._num_local), dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(free, torch.distributed.ReduceOp.MIN)
        return int(free)

    def is_warned(self) -> bool:
        """Whether Ray has announced that it will take a node of the group away."""
        return self._notices.came

    def place(self) -> str:
        """Returns node, process and log."""
        import ray

        node = f"node {socket.gethostname()} at {ray.util.get_node_ip_address()}"
        return f"{node}, process {os.getpid()}, log {worker_log()}"

    def exchange(self, text: str) -> list[str]:
        """Returns what all workers give, through the process group."""
        return exchange(text, self.device)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Sends the tensors of the first worker to all others."""
        share(tensors)

    def check_agreement(self, parts: Mapping[str, str]) -> None:
        """Compares with all other workers."""
        check_agreement(parts, self.device)


def train_here(specs: list[RunSpec], stop: Stop) -> None:
    """Trains in this process."""
    train_runs(specs, LocalContext(stop, resolved_device(specs[0].config.device)), warn)


def train_on_ray(specs: list[RunSpec], stop: Stop, warned: Sequence[str] = ()) -> None:
    """Trains on workers of the Ray cluster that this process is connected to.

    Args:
        specs: The runs.
        stop: Tells whether to stop.
        warned: What this process has already warned of, which no worker says again.

    Raises:
        DoesNotFitError: The workers found that a stage does not fit into their memory.
        TrainingError: Workers failed too often, have no room any more, or cannot import a class of the user's own.
    """
    import ray.train
    from ray.exceptions import ActorDiedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from raywgen.training.worker_failures import FailureLog, failure_text, lost_room, places_of, worker_timeouts

    first = specs[0].config
    if reason := await_room(first, alive_nodes, ask_autoscaler):
        raise TrainingError(f"{first.out}: training has not begun: {reason}; {remedy(first)}")
    storage = Storage.at(first.out)
    uses_gpus, outs = first.device == "cuda", [absolute(spec.config.out) for spec in specs]
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={
            "specs": [_with_absolute_paths(spec) for spec in specs],
            "trust": trusted(),
            "warned": [*warned],
        },
        torch_config=TorchConfig(
            backend="nccl" if uses_gpus else "gloo",
            # Ray finds a process that hangs within `worker_timeout`; only then do the others give up waiting for it.
            timeout_s=math.ceil(first.worker_timeout + _LATER_SECONDS),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(first.min_workers, first.max_workers) if first.is_elastic else first.max_workers,
            use_gpu=uses_gpus,
            elastic_resize_monitor_interval_s=first.resize_seconds,
        ),
        run_config=ray.train.RunConfig(
            name=_RAY,
            storage_path=storage.root,
            storage_filesystem=None if storage.is_local else storage.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=first.max_failures),
            callbacks=[FailureLog(outs, first)],
        ),
    )
    try:
        with worker_timeouts(first.worker_timeout):
            refusal = _fit(trainer, StopFile(first.out), stop).return_value
    except ray.train.WorkerGroupError as error:
        reason = failure_text(error.worker_failures, places_of(first.out), first.worker_timeout)
        raise TrainingError(
            f"{first.out}: training stopped: {reason}; logs are under {first.out}/{_RAY} and in Ray's session folder, "
            "the same command goes on from the last checkpoint"
        ) from error
    except ActorDiedError as error:
        if reason := lost_room(outs):
            raise TrainingError(f"{first.out}: training stopped: {reason}; {remedy(first)}") from error
        missing = re.search(r"No module named '([\w.]+)'", str(error))
        if missing is None:
            raise
        raise TrainingError(
            f"{first.out}: workers cannot import '{missing[1]}', which this process can; install it on all nodes, or "
            "give the command in the folder that holds it (for a job, the folder that is sent)"
        ) from error
    if refusal is not None:
        raise DoesNotFitError(refusal)


def worker_loop(arguments: dict[str, Any]) -> str | None:
    """The training loop of every Ray Train worker. Ray pickles an importable function by its name.

    Returns:
        Why a run does not fit into memory, on which all workers agree; Ray Train would try again after an error.
    """
    from raywgen.training.worker_failures import is_cut_off

    specs: list[RunSpec] = arguments["specs"]
    worker = RayContext(specs[0].config.out)

    def warn_once(sentence: str) -> None:
        if worker.rank == 0 and sentence not in arguments["warned"]:
            print(f"{CheckpointWarning.__name__}: {sentence}", file=sys.stderr, flush=True)

    with trusting(*arguments["trust"]):
        try:
            train_runs(specs, worker, warn_once)
        except DoesNotFitError as error:
            return str(error)
        except RuntimeError as error:
            if is_cut_off(error):
                time.sleep(_BLAME_SECONDS)  # Meanwhile Ray finds the worker that is gone, and blames that one.
            raise
    return None


def _fit(trainer: TorchTrainer, flag: StopFile, stop: Stop) -> Result:
    """Runs a trainer while this process waits for signals, and passes a request to stop on by a file."""
    flag.withdraw()
    if threading.current_thread() is not threading.main_thread():
        return trainer.fit()
    failures: list[BaseException] = []
    results: list[Result] = []

    def fit() -> None:
        try:
            results.append(trainer.fit())
        except BaseException as error:
            failures.append(error)

    # The trainer runs in a thread of its own: in the main thread Ray takes over Ctrl-C and ends without a checkpoint.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    try:
        with stop.awaited():
            while thread.is_alive():
                thread.join(_POLL_SECONDS / 2)
                if stop.asked():
                    flag.ask()
    finally:
        flag.withdraw()
    if failures:
        raise failures[0]
    return results[0]


def _with_absolute_paths(spec: RunSpec) -> RunSpec:
    """The run with paths that mean the same in a worker, which Ray Train starts in a folder of its own."""
    config = replace(spec.config, corpus=absolute(spec.config.corpus), out=absolute(spec.config.out))
    return replace(spec, config=config, init_from=absolute(spec.init_from) if spec.init_from else "")
