"""Each private part of Ray and DeepSpeed that raywgen uses, called on the installed versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import deepspeed
import grpc
import pytest
import ray
from ray import tune
from ray.job_submission import JobSubmissionClient
from ray.tune.experiment import Trial

from raywgen import compat
from tests.packing import packed

ROOT = Path(__file__).parents[1]
_PRIVATE = re.compile(
    r"ray\._[a-z]|ray\.core\.|internal_kv|deepspeed\.(ops|runtime)|\bclient\._|__compatible_ops__|_lazy_init_"
    r"|def _get_new_config"
)


def test_no_other_file_uses_private_parts() -> None:
    files = [path for folder in ("raywgen", "jobs") for path in (ROOT / folder).rglob("*.py")]
    using = {str(path.relative_to(ROOT)) for path in files if _PRIVATE.search(path.read_text())}
    assert using == {"raywgen/compat.py"}


@pytest.fixture(scope="module")
def session() -> Iterator[dict[str, str]]:
    """The addresses of a Ray session with a dashboard."""
    context: Any = ray.init(address="local", num_cpus=1, include_dashboard=True, log_to_driver=False)
    yield context.address_info
    ray.shutdown()


def test_a_session_and_its_dashboard_report_node_types(session: dict[str, str]) -> None:
    types = None
    for _ in range(100):  # The monitor writes every five seconds.
        types = compat.autoscaler_node_types()
        if types is not None:
            break
        time.sleep(0.2)
    (node,) = ray.nodes()
    assert types == {node["NodeID"]: f"node_{node['NodeID']}"}
    assert compat.dashboard_node_types(JobSubmissionClient(f"http://{session['webui_url']}")) == types


def test_a_head_node_tells_its_clusters_id(session: dict[str, str]) -> None:
    compat.request_cluster_id(session["gcs_address"], timeout=5.0)
    with pytest.raises(grpc.RpcError):
        compat.request_cluster_id("127.0.0.1:1", timeout=1.0)


def test_the_packed_paths_are_those_of_the_package(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    for name in ("a.py", "kept/b.py", "left/c.py", ".git/config", "d.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("*.bin\n")
    found = {str(path.relative_to(folder)) for path in compat.packed_paths(folder, ["left"]) if path.is_file()}
    assert found == {"a.py", "kept/b.py", ".gitignore"}
    assert packed(folder, tmp_path / "package.zip", ["left"]) == found


def test_the_failure_of_a_worker_tells_whether_its_process_did() -> None:
    from ray.train.v2._internal import exceptions

    died = exceptions.WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError())
    hung = exceptions.WorkerHealthCheckTimeoutError("A worker health check has been hanging.")
    assert [compat.lost_worker(error) for error in (died, hung, RuntimeError())] == ["died", "hung", None]
    assert compat.worker_log() == "", "this process is no worker; tests/training/test_launcher.py asks one"


def test_ignore_patterns_match_as_in_gitignore(tmp_path: Path) -> None:
    is_ignored = compat.ignore_matcher(tmp_path, ["*.pem", "!/mine.pem"])
    assert is_ignored(tmp_path / "deep" / "one.pem")
    assert not is_ignored(tmp_path / "mine.pem")
    assert not is_ignored(tmp_path / "one.py")


def test_a_member_that_takes_over_a_config_keeps_its_name() -> None:
    knobs = {"rate": tune.uniform(0.0, 1.0)}
    made = compat.population_based_training(
        keep="trial", time_attr="rung", metric="score", mode="max", hyperparam_mutations={"knobs": knobs}
    )
    scheduler: Any = cloudpickle.loads(cloudpickle.dumps(made))
    weak, strong = (Trial("none", config={"trial": name, "knobs": {"rate": 0.5}}, stub=True) for name in "ab")
    controller: Any = SimpleNamespace(search_alg=None)
    for trial in (weak, strong):
        scheduler.on_trial_add(controller, trial)
    config, _ = scheduler._get_new_config(weak, strong)
    assert config["trial"] == "a"
    assert config["knobs"].keys() == knobs.keys()


def test_shared_memory_collectives_are_not_compiled() -> None:
    compat.skip_shared_memory_collectives()
    ops: Any = deepspeed.ops
    assert ops.__compatible_ops__["deepspeed_shm_comm"] is False


_SET_STATE = """
import sys, deepspeed, torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from raywgen import compat

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
compat.skip_shared_memory_collectives()
model = torch.nn.Linear(3, 2)
adam = torch.optim.AdamW(model.parameters())
config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 1}}
engine = deepspeed.initialize(model=model, optimizer=adam, dist_init_required=False, config=config)[0]
for group in adam.param_groups:
    for shard in group["params"]:
        adam.state[shard] = {"exp_avg": torch.zeros_like(shard), "exp_avg_sq": torch.zeros_like(shard)}
compat.link_optimizer_state(engine)
assert [len(shard) for shard in compat.state_shards(engine)] == [8]
assert compat.shard_of(model.weight) is None
wanted = torch.randn(2, 3)
safe_set_full_optimizer_state(model.weight, wanted, "exp_avg")
assert torch.equal(safe_get_full_optimizer_state(model.weight, "exp_avg"), wanted)

model = torch.nn.Linear(3, 2)
adam = torch.optim.AdamW(model.parameters())
config["zero_optimization"] = {
    "stage": 3, "stage3_param_persistence_threshold": 2, "memory_efficient_linear": False
}
engine = deepspeed.initialize(model=model, optimizer=adam, dist_init_required=False, config=config)[0]
assert [len(shard) for shard in compat.state_shards(engine)] == [8]
assert compat.shard_of(model.weight).shape == (6,) and model.weight.numel() == 0
with torch.no_grad():
    compat.shard_of(model.bias).fill_(7)
compat.refresh_whole_parameters(engine)
assert model.bias.tolist() == [7, 7]
plain = torch.nn.functional.linear
with compat.releasing_linear():
    assert torch.nn.functional.linear is not plain
    assert model(torch.ones(3)).shape == (2,)
assert torch.nn.functional.linear is plain
hooks = len(model._forward_pre_hooks)
compat.remove_gathering_hooks(engine)
assert len(model._forward_pre_hooks) < hooks
"""


def test_a_fresh_optimisers_state_can_be_set(tmp_path: Path) -> None:
    """In a process of its own, as DeepSpeed remembers the process group."""
    environment = os.environ | {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", _SET_STATE, str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
