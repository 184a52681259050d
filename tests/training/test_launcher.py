"""Real Ray Train workers with DeepSpeed ZeRO, against the same run in one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raywgen.corpus import Corpus
from raywgen.generators import OptimizerConfig
from raywgen.generators.bundle import build_generator
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.generators.mcdi import McDiConfig
from raywgen.generators.mcdi.config import DenoiserConfig, DiffusionConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.checkpoints import CheckpointWarning
from raywgen.training.data import data_spec, measure_normalizers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config(corpus: Corpus, out: Path, **changes: Any) -> TrainConfig:
    igpg = IGPGConfig(
        tokenizer=TokenizerConfig(
            num_steps=4, batch_size=8, quantiser=QuantiserConfig(num_levels=3, num_codes=16), width=16
        ),
        prior=PriorConfig(num_steps=40, batch_size=8, width=16, num_layers=1, num_heads=2),
        task_loss=IGPGTaskLossConfig(num_steps=4, batch_size=8),
    )
    settings: dict[str, Any] = {"log_every": 1, "checkpoint_every": 10, "validate_every": 20, "num_workers": 2}
    settings |= changes
    return TrainConfig(generator=igpg, corpus=corpus.location, out=str(out), **settings)


def losses(out: Path, name: str = "loss") -> dict[tuple[str, int], float]:
    rows = read_metrics(out)
    assert len({(row["stage"], row["step"]) for row in rows}) == len(rows), "a step is logged twice"
    return {(row["stage"], row["step"]): row[name] for row in rows}


@pytest.fixture(scope="module")
def alone(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], float]:
    out = tmp_path_factory.mktemp("alone")
    launch([config(zoo_corpus, out, num_workers=0)])
    return losses(out)


def assert_same_run(found: dict[tuple[str, int], float], alone: dict[tuple[str, int], float]) -> None:
    """Two workers add gradients in another order than one; 48 steps of float32 let that grow to about 1e-3."""
    assert found.keys() == alone.keys()
    for key, loss in alone.items():
        assert found[key] == pytest.approx(loss, rel=5e-3), key


STRATEGIES: dict[str, dict[str, Any]] = {"auto": {"strategy": "auto"}, "zero3": {"zero_stage": 3}}
REPTILE = McDiConfig(
    diffusion=DiffusionConfig(num_targets=2),
    network=NetworkConfig(width=16, num_layers=1, num_heads=2),
    denoiser=DenoiserConfig(
        num_steps=12,
        batch_size=8,
        inner_rate=0.05,
        optimizer=OptimizerConfig(kind="sgd", learning_rate=0.5, grad_clip=100.0, weight_decay=0.0, warmup_steps=0),
    ),
)


def reptile_config(corpus: Corpus, out: Path, **changes: Any) -> TrainConfig:
    return replace(config(corpus, out, shot=2, checkpoint_every=5, **changes), method="mcdi", generator=REPTILE)


@pytest.fixture(scope="module")
def reptile_alone(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reptile")
    launch([reptile_config(zoo_corpus, out, num_workers=0)])
    return out


@pytest.fixture(scope="module")
def by_two(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of several strategies that the same two workers train one after another, all of relative paths."""
    root = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        relative = Corpus.open(os.path.relpath(zoo_corpus.location))
        runs = [config(relative, Path(name), **strategy) for name, strategy in STRATEGIES.items()]
        runs += [reptile_config(relative, Path(f"reptile{stage}"), zero_stage=stage) for stage in (0, 3)]
        launch(runs)
    return root


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_workers_train_what_one_process_trains(
    strategy: str, by_two: Path, alone: dict[tuple[str, int], float]
) -> None:
    assert_same_run(losses(by_two / strategy), alone)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_reptile_over_two_workers_gives_the_weights_of_one(
    zero_stage: int, zoo_corpus: Corpus, by_two: Path, reptile_alone: Path
) -> None:
    """Each worker adapts to its own half of the meta-batch; the outer step is the mean over both."""
    two = by_two / f"reptile{zero_stage}"
    weights = {out: load_file(out / "generator" / "generator.safetensors") for out in (reptile_alone, two)}
    normalizers, data = measure_normalizers(zoo_corpus), data_spec(zoo_corpus)
    start = build_generator("mcdi", REPTILE, normalizers, data, seed=0).state_dict()
    moved = 0.0
    for name, alone in weights[reptile_alone].items():
        # Float32 sums in another order, over 12 steps.
        torch.testing.assert_close(weights[two][name], alone, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: n + m)
        if name.startswith("model."):
            moved = max(moved, float((alone - start[name.removeprefix("model.")]).abs().max()))
    assert moved > 0.02
    assert_same_run(losses(two, "consistency"), losses(reptile_alone, "consistency"))


def test_paths_may_be_relative(by_two: Path) -> None:
    assert sorted(path.name for path in by_two.iterdir()) == ["auto", "reptile0", "reptile3", "zero3"]
    for out in by_two.iterdir():
        assert (out / "generator" / "generator.json").is_file()


def test_a_killed_worker_costs_at_most_a_checkpoint_interval(
    zoo_corpus: Corpus, tmp_path: Path, alone: dict[tuple[str, int], float]
) -> None:
    killed = threading.Event()
    threading.Thread(target=_kill_a_worker, args=(tmp_path, killed), daemon=True).start()
    launch([config(zoo_corpus, tmp_path, zero_stage=1)])
    assert killed.is_set()
    assert_same_run(losses(tmp_path), alone)


def test_a_run_whose_workers_died_goes_on_without_ray(
    zoo_corpus: Corpus, tmp_path: Path, alone: dict[tuple[str, int], float]
) -> None:
    stop = config(zoo_corpus, tmp_path, zero_stage=3, max_failures=0)
    killed = threading.Event()
    threading.Thread(target=_kill_a_worker, args=(tmp_path, killed), daemon=True).start()
    with pytest.raises(RuntimeError, match="the same command goes on from the last checkpoint"):
        launch([stop])
    first = max(row["step"] for row in read_metrics(tmp_path) if row["stage"] == "prior")
    assert first < 39
    launch([config(zoo_corpus, tmp_path, num_workers=0)])
    assert_same_run(losses(tmp_path), alone)


def test_a_run_goes_on_with_ray_where_it_stopped_without(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[tuple[str, int], float]
) -> None:
    """Also moved, by a relative path, and with its newest checkpoint broken; rows of before stay as they were."""
    launch([config(zoo_corpus, tmp_path / "a", num_workers=0)], stop_at=0.5)
    out = tmp_path / "b"
    (tmp_path / "a").rename(out)
    before = (out / "metrics.jsonl").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["02-000000000", "02-000000002"]
    *_, part = sorted((out / "checkpoints" / names[-1]).glob("part-*.safetensors"))
    with part.open("r+b") as state:
        state.truncate(1000)
    with pytest.warns(CheckpointWarning, match="passed over.*training goes on from step 0 of stage 'task_loss'"):
        launch([config(zoo_corpus, Path("b"), num_workers=2)])
    assert_same_run(losses(out), alone)
    assert (out / "metrics.jsonl").read_text().splitlines()[:44] == before[:44]


def _kill_a_worker(out: Path, killed: threading.Event) -> None:
    """SIGKILL to one training worker once the prior has passed its second checkpoint and Ray has seen it."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(row["stage"] == "prior" and row["step"] >= 22 for row in read_metrics(out)):
            for pid in _worker_pids():
                os.kill(pid, signal.SIGKILL)
                killed.set()
                return
        time.sleep(0.02)


def _worker_pids() -> list[int]:
    """Training workers of this process' own Ray session; other sessions may share the machine."""
    parents: dict[int, int] = {}
    workers: list[int] = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = (folder / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if b"RayTrainWorker" in title:
            workers.append(int(folder.name))
    return [pid for pid in workers if os.getpid() in _ancestors(pid, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    found: set[int] = set()
    while pid in parents and pid not in found:
        found.add(pid)
        pid = parents[pid]
    return found
