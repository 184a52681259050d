from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raywgen.cluster.render import render
from raywgen.cluster.settings import RenderConfig
from raywgen.config import ConfigError, load_config
from raywgen.ray_address import ClusterError
from raywgen.training import TrainConfig
from raywgen.training.resource_check import first_unplaceable, worker_requests
from tests.cluster.test_manifests import refusals


def rendered(run: TrainConfig, **settings: Any) -> dict[str, Any]:
    files = render(run, RenderConfig(**settings))
    return {name: yaml.safe_load(text) for name, text in files.items()}


def test_the_elastic_range_holds_the_runs_workers() -> None:
    run = TrainConfig(num_workers=15)
    for cpus in (1, 4, 16):
        fewest = -(-16 // cpus)  # Fifteen workers, and one CPU to read the corpus.
        spec = rendered(run, cpus=cpus, max_nodes=fewest)["raycluster.yaml"]["spec"]
        (group, *_) = spec["workerGroupSpecs"]
        nodes = [{"CPU": float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])}] * fewest
        assert first_unplaceable(worker_requests(run), nodes) is None
        with pytest.raises(ClusterError, match=r"or add nodes by cluster\.max_nodes"):
            render(run, RenderConfig(cpus=cpus, min_nodes=0, max_nodes=fewest - 1, max_gpu_nodes=0))


def test_a_run_on_gpus_needs_gpu_nodes() -> None:
    run = TrainConfig(num_workers=4, device="cuda")
    spec = rendered(run, gpus=2, max_gpu_nodes=2)["raycluster.yaml"]["spec"]
    limits = spec["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "2"
    with pytest.raises(ClusterError, match=r"4 x 1 GPU .* give num_workers=2, or add nodes by cluster\.max_gpu_nodes"):
        render(run, RenderConfig(gpus=2, max_gpu_nodes=1))


def test_settings_reach_every_file() -> None:
    run = TrainConfig(corpus="s3://bucket/corpus", out="/data/run")
    files = rendered(
        run,
        name="mine",
        namespace="research",
        ray_version="2.61.0",
        python="3.12",
        mount="/data",
        s3_secret="bucket-keys",
        token_secret="ray-token",
        storage_class="fast",
    )
    for name, kind in (("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")):
        assert refusals(kind, files[name]) == []
        assert files[name]["metadata"]["namespace"] == "research"
    spec = files["raycluster.yaml"]["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    of_job = files["rayjob.yaml"]["spec"]["rayClusterSpec"]
    assert str(of_job).replace("'mine-train'", "'mine'") == str(spec), "they differ in the label of their pods alone"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].startswith("rayproject/ray:2.61.0-py312-")
        assert [entry["valueFrom"]["secretKeyRef"] for entry in container["env"]] == [
            {"name": "bucket-keys", "key": key} for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        ]
    assert files["storage.yaml"]["spec"]["storageClassName"] == "fast"
    assert "corpus=s3://bucket/corpus out=/data/run" in files["rayjob.yaml"]["spec"]["entrypoint"]


def test_relative_paths_go_to_the_shared_storage() -> None:
    entrypoint = rendered(TrainConfig())["rayjob.yaml"]["spec"]["entrypoint"]
    assert entrypoint == "python jobs/train.py corpus=/mnt/raywgen/runs/zoo/corpus out=/mnt/raywgen/runs/igpg"


@pytest.mark.parametrize(
    ("run", "config", "said"),
    [
        ({"out": "/home/me/run"}, None, "out=/home/me/run lies on no storage that nodes share"),
        ({"corpus": "s3://bucket/corpus"}, None, "needs credentials on every node: give cluster.s3_secret"),
        ({}, "../mine.yaml", "name the config relative to the clone"),
    ],
)
def test_what_pods_could_not_reach_is_refused(run: dict[str, Any], config: str | None, said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        render(TrainConfig(**run), RenderConfig(), config)


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_nodes=4 must lie between 0 and max_nodes=2"):
        load_config(RenderConfig, None, ["min_nodes=4", "max_nodes=2"])


def test_the_command_takes_run_and_cluster(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from raywgen.cli import app

    into = tmp_path / "rendered"
    arguments = ["num_workers=3", "cluster.cpus=2", "cluster.max_nodes=2", "--into", str(into)]
    done = CliRunner().invoke(app, ["cluster", "render", "method=mcdi", *arguments])
    assert done.exit_code == 0, done.output
    spec = yaml.safe_load((into / "raycluster.yaml").read_text())["spec"]
    assert spec["workerGroupSpecs"][0]["maxReplicas"] == 2
    job = yaml.safe_load((into / "rayjob.yaml").read_text())
    assert job["spec"]["entrypoint"].endswith("method=mcdi num_workers=3")
