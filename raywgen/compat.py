"""The private parts of Ray and DeepSpeed that raywgen uses, one small function each.

Neither library promises to keep them, so pyproject.toml bounds both versions from above, and tests/test_compat.py calls
every function here on the installed ones. Nothing else in raywgen may use a private part of either.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import PopulationBasedTraining
    from requests import Response
    from torch import Tensor

# Ray


def autoscaler_node_types() -> Mapping[str, str] | None:
    """Returns the type of each node as the monitor of the connected cluster last reported it; None before a report.

    The public state API has nodes, but not whether an autoscaler may add some.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    status = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = json.loads(status).get("autoscaler_report") if status else None
    return report["node_type_mapping"] if report else None


def dashboard_node_types(client: JobSubmissionClient) -> Mapping[str, str] | None:
    """Returns the same report as `autoscaler_node_types` through a cluster's dashboard.

    None if there is no such report, as with KubeRay's autoscaler. The job client has no public way to another address
    of the dashboard, and it is what holds the token and the cookies.
    """
    response = client._do_request("GET", "/api/cluster_status")
    status: dict[str, Any] = response.json().get("data", {}).get("clusterStatus") or {}
    return (status.get("autoscalerReport") or {}).get("nodeTypeMapping")


def job_client(address: str, request: Callable[[str, Callable[[], Response]], Response]) -> JobSubmissionClient:
    """Returns Ray's client of a job server, each of whose requests goes through a function.

    The client gives up at the first connection that is dropped, and has no public way to try again.

    Args:
        address: Address of the dashboard or of the head node.
        request: Takes the method of a request, such as `GET`, and the function that sends it; returns the answer.
    """
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **settings: Any) -> Response:
            return request(method, lambda: super(Client, self)._do_request(method, endpoint, **settings))

    return Client(address)


def request_cluster_id(address: str, timeout: float) -> None:
    """Asks a head node for its cluster's id: the cheapest call that needs the token.

    `ray.init` would retry a wrong address or token for minutes, and end without a reason.

    Args:
        address: Host and port of the head node.
        timeout: Seconds to wait for the answer.

    Raises:
        grpc.RpcError: Nobody answers, or the token is refused.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2
    channel = init_grpc_channel(address)
    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        stub.GetClusterId(messages.GetClusterIdRequest(), timeout=timeout)
    finally:
        channel.close()


def packed_paths(folder: Path, excludes: Sequence[str]) -> list[Path]:
    """Returns all paths that Ray packs of a working directory, by its own ignore rules.

    The size must be known before the upload begins, and only Ray knows its rules.

    Args:
        folder: The working directory, absolute.
        excludes: Patterns of the runtime environment, which hold beside those of ignore files.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel

    found: list[Path] = []
    ignores = [ignore_matcher(folder, [*ray_constants.get_runtime_env_default_excludes(), *excludes])]
    include_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    quiet = logging.getLogger("raywgen.quiet")
    _dir_travel(folder, ignores, found.append, include_gitignore=include_gitignore, logger=quiet)
    return found


def ignore_matcher(folder: Path, patterns: Sequence[str]) -> Callable[[Path], bool]:
    """Returns Ray's own function for whether patterns, written as in `.gitignore`, match a path in a folder."""
    from ray._private.runtime_env.packaging import _get_excludes

    return _get_excludes(folder, list(patterns))


def population_based_training(keep: str, **settings: Any) -> PopulationBasedTraining:
    """Returns Ray Tune's scheduler, whose members keep one key of their config when they take over another's.

    Tune decides the new config in a private method; its `custom_explore_fn` does not see the member's own config.

    Args:
        keep: The key, such as the member's name.
        settings: Arguments of `PopulationBasedTraining`.
    """
    from ray.tune.schedulers import PopulationBasedTraining

    class Population(PopulationBasedTraining):
        def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
            config, operations = super()._get_new_config(trial, trial_to_clone)
            return {**config, keep: trial.config[keep]}, operations

    return Population(**settings)


def lost_worker(error: BaseException) -> Literal["died", "hung"] | None:
    """Returns whether Ray Train gives up a worker because its process ended or because it does not answer.

    Args:
        error: One of a `WorkerGroupError`'s failures; None is returned of what the training loop itself has raised.
    """
    from ray.train.v2._internal import exceptions

    if isinstance(error, exceptions.WorkerHealthCheckTimeoutError):
        return "hung"
    return "died" if isinstance(error, exceptions.WorkerHealthCheckFailedError) else None


def worker_log() -> str:
    """Returns the path, on its node, of the log of the Ray Train worker that this process is; empty if it has none."""
    from ray.train.v2._internal.logging.logging import get_train_application_worker_log_path

    return get_train_application_worker_log_path() or ""


# DeepSpeed


def skip_shared_memory_collectives() -> None:
    """Keeps DeepSpeed from compiling its shared-memory collectives, which serve inference only and take a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def link_optimizer_state(engine: object) -> None:
    """Links each parameter to its shards of the optimiser's state, so that `moment_fragment` finds them.

    DeepSpeed does so in its first step only, but a resumed run sets the state before that.

    Args:
        engine: A `DeepSpeedEngine` of ZeRO stage 1 or 2 whose optimiser holds a state for every shard.
    """
    cast("Any", engine).optimizer._lazy_init_hp_params_optimizer_state()


def state_shards(engine: object) -> list[Tensor]:
    """Returns this worker's flat shards, each of which the optimiser has a state for.

    Args:
        engine: A `DeepSpeedEngine` of ZeRO stage 1, 2 or 3.
    """
    optimizer = cast("Any", engine).optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3 gives them to the optimiser for a step only.
        return list(optimizer.fp32_partitioned_groups_flat)
    return [shard for group in optimizer.optimizer.param_groups for shard in group["params"]]


def shard_of(parameter: Tensor) -> Tensor | None:
    """Returns this worker's shard of a parameter that ZeRO-3 shards, flat and padded; None of any other tensor."""
    return getattr(parameter, "ds_tensor", None)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of a whole parameter, whether ZeRO-3 shards it or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def moment_fragment(parameter: Tensor, key: str) -> tuple[int, Tensor] | None:
    """Returns this worker's values of a moment under ZeRO-1 or 2, and the place of the first in the flat parameter.

    None where the worker has no values of this parameter. They may be written to. DeepSpeed's public functions return
    the whole moment, summed over all workers.

    Args:
        parameter: A parameter whose optimiser's state is linked, see `link_optimizer_state`.
        key: Name of the moment, such as `exp_avg`.
    """
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)


def remove_gathering_hooks(engine: object) -> None:
    """Takes away the hooks by which ZeRO-3 gathers parameters module by module, so that somebody else gathers them.

    Args:
        engine: A `DeepSpeedEngine` of ZeRO stage 3.
    """
    cast("Any", engine).optimizer.parameter_offload.destroy()


def release_engine(engine: object) -> None:
    """Cuts all by which DeepSpeed holds on to an engine, so that its stage and optimiser can be freed.

    Its own `destroy` leaves hooks after the backward pass, and ZeRO-3 leaves the stage on a list of the process.

    Args:
        engine: A `DeepSpeedEngine` of any ZeRO stage, which takes no step any more.
    """
    from deepspeed.runtime.zero import parameter_offload

    found = cast("Any", engine)
    found.destroy()
    modules = parameter_offload.FWD_MODULE_STACK
    modules[:] = [module for module in modules if module is not found.module]


@contextmanager
def releasing_linear() -> Iterator[None]:
    """Linear layers of this block keep no hold of their weights, so that ZeRO-3 can release them until the backward.

    DeepSpeed's own setting, `memory_efficient_linear`, changes all linear layers of the process for good.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from torch.nn import functional

    plain = functional.linear
    functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        functional.linear = plain


def refresh_whole_parameters(engine: object) -> None:
    """Makes parameters that ZeRO-3 keeps whole, as they are small, equal to their shards, which somebody has written.

    Args:
        engine: A `DeepSpeedEngine` of any ZeRO stage.
    """
    small: list[Any] = getattr(cast("Any", engine).optimizer, "persistent_parameters", [])
    if small:
        small[0].partition(small)
        small[0].all_gather(small)
