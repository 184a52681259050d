"""What stages that run whole networks need, and the refusal of those that do not fit."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.config import merge_config
from raywgen.corpus import Corpus
from raywgen.generators import Generator, Stage, method
from raywgen.generators.bundle import build_generator
from raywgen.nn.memory import max_min_share
from raywgen.tasks import build_network
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.live_bytes import LiveBytes
from raywgen.training.memory_check import check_memory, declared_memory, least_state_bytes
from raywgen.training.resource_check import Nodes
from raywgen.training.strategy import DoesNotFitError
from raywgen.weights import KeyedNoise, Layout, Normalizer, WeightBatch
from tests.builders import DATA, condition

pytestmark = pytest.mark.usefixtures("one_thread")
_STEPS: dict[str, Any] = {"num_steps": 1}
_NETWORK = {"kind": "chunks", "width": 64, "window": 16}
_TOKENIZER = _STEPS | {"chunk_length": 16, "width": 16, "quantiser": {"num_levels": 2, "num_codes": 16}}
_PRIOR = _STEPS | {"width": 64, "num_layers": 2, "window": 0}
_CODES = {"quantiser": {"num_levels": 4, "num_codes": 64}}
_WHOLE = _NETWORK | {"window": 0}
_ALONE: dict[str, Any] = {"task_loss": {"num_steps": 0}}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mcdi": ("mcdi", {"network": _NETWORK, "task_loss": _STEPS}),
    "mcdi_long": ("mcdi", {"network": _NETWORK | {"num_layers": 1}, "task_loss": _STEPS | {"sampling_steps": 4}}),
    "lohp": ("lohp", {"network": _NETWORK, "task_loss": _STEPS}),
    "direct": ("direct", {"network": _NETWORK, "task_loss": _STEPS}),
    "direct_wide": ("direct", {"network": _NETWORK | {"width": 256, "window": 0}, "task_loss": _STEPS}),
    "hypernetwork": ("hypernetwork", {"task_loss": _STEPS}),
    "igpg": (
        "igpg",
        {
            "tokenizer": _TOKENIZER,
            "prior": _STEPS | {"width": 64, "num_layers": 2, "window": 16},
            "task_loss": _STEPS | {"windows": "parallel", "nll_weight": 0.0},
        },
    ),
    "tokenizer": ("igpg", _ALONE | {"tokenizer": _TOKENIZER | {"window": 0, "width": 64}}),
    "tokenizer_conv": ("igpg", _ALONE | {"tokenizer": _TOKENIZER | {"window": 0, "coder": "conv", "coder_layers": 2}}),
    "tokenizer_transformer": ("igpg", _ALONE | {"tokenizer": _TOKENIZER | {"window": 0, "coder": "transformer"}}),
    "tokenizer_scales": ("igpg", _ALONE | {"tokenizer": _TOKENIZER | {"scales": "tensor", "window": 0}}),
    "prior": ("igpg", _ALONE | {"tokenizer": _TOKENIZER, "prior": _PRIOR}),
    "prior_codes": ("igpg", _ALONE | {"tokenizer": _TOKENIZER | _CODES, "prior": _PRIOR | {"num_layers": 1}}),
    "denoiser": ("mcdi", _ALONE | {"network": _WHOLE, "denoiser": _STEPS | {"meta": "joint", "num_draws": 3}}),
    "policy": (
        "lohp",
        {"network": _WHOLE, "path": {"num_steps": 4, "length": 2}, "sampling": {"num_steps": 2}, "policy": _STEPS},
    ),
    "policy_cloning": ("lohp", {"network": _WHOLE, "policy": _STEPS | {"objective": "cloning"}}),
    "regression": ("direct", _ALONE | {"network": _WHOLE, "regression": _STEPS}),
}


def built(name: str, width: int) -> tuple[Generator, WeightBatch]:
    module = build_network({"name": "mlp", "widths": [6, width, 2]})
    layout = Layout.from_state_dict(module.state_dict())
    values_1D = layout.flatten(module.state_dict()).unsqueeze(0)
    num_tensors = len(layout.generated)
    table = {layout.id: (layout, Normalizer(layout, torch.zeros(num_tensors), torch.ones(num_tensors)))}
    key, settings = SETTINGS[name]
    generator = build_generator(key, merge_config(method(key).Config, [(key, settings)]), table, DATA, seed=0)
    batch = WeightBatch(
        values_BD=values_1D,
        layout=layout,
        module=module,
        condition=condition(1),
        query=condition(1, 5),
        sample_index_B=torch.arange(1),
        targets_BAD=values_1D.unsqueeze(1).expand(-1, max(1, generator.needs.num_targets), -1),
    )
    return generator, batch


@pytest.mark.parametrize("name", SETTINGS)
def test_the_need_of_a_network_is_about_what_is_measured(name: str) -> None:
    needs, stage = [], None
    for width in (100, 400):
        generator, batch = built(name, width)
        stage = next((stage for stage in generator.stages() if stage.name in name), generator.stages()[-1])
        stage.setup([batch], 0)
        with LiveBytes() as live:
            stage(batch, KeyedNoise(0, batch.sample_index_B))
        needs.append((batch.layout.num_values, live.peak))
    assert stage is not None
    (small, less), (large, more) = needs
    measured = (more - less) / (large - small)
    # Batches and blocks of the last window count as whole ones.
    assert 0.5 * measured < stage.bytes_per_value < 1.15 * measured


def check(name: str = "direct", gib: float = 1.0, **settings: Any) -> None:
    generator, batch = built(name, 400)  # 3,602 values.
    stages: Sequence[Stage] = [stage for stage in generator.stages() if stage.name == "task_loss"]
    key, parts = SETTINGS[name]
    parts = parts | {"task_loss": _STEPS | {"batch_size": settings.pop("batch_size", 64)}}
    run = merge_config(TrainConfig, [("run", {"method": key, "generator": parts, "num_workers": 0} | settings)])
    for stage in stages:
        stage.config.batch_size = run.generator.task_loss.batch_size  # pyright: ignore[reportAttributeAccessIssue]
    state = sum(least_state_bytes(stage, run) for stage in stages)
    check_memory(stages, [replace(batch.layout)], run, int(gib * 2**30) + state)


def need(name: str = "direct") -> float:
    """GiB of one network."""
    generator, batch = built(name, 400)
    return batch.layout.num_values * generator.stages()[-1].bytes_per_value / 2**30


def test_what_fits_is_trained() -> None:
    check(gib=64.1 * need())
    check(gib=16.1 * need(), accumulate=4)
    check(gib=8.1 * need(), accumulate=4, num_workers=2)
    check(gib=1.1 * need(), strategy="auto")


def test_the_refusal_says_what_it_would_need_and_what_to_lower() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        check(gib=10.1 * need())
    said = str(refused.value)
    assert said.startswith("stage 'task_loss' of direct runs whole networks: those of 3,602 values take at least ")
    assert "64 at once (generator.task_loss.batch_size=64, 1 worker, accumulate=1)" in said
    remedies = re.search(r"accumulate=(\d+), or generator.task_loss.batch_size=(\d+), or (.*), or more memory$", said)
    assert remedies
    assert remedies[3] == "generator.task_loss.num_steps=0, which leaves the stage out"
    check(gib=10.1 * need(), accumulate=int(remedies[1]))
    check(gib=10.1 * need(), batch_size=int(remedies[2]))
    with pytest.raises(DoesNotFitError):
        check(gib=10.1 * need(), batch_size=int(remedies[2]) + 1)
    with pytest.raises(DoesNotFitError):
        check(gib=10.1 * need(), accumulate=int(remedies[1]) - 1)


@pytest.mark.parametrize(("name", "wanted"), [("hypernetwork", "give more memory"), ("direct", "num_steps=0")])
def test_where_not_even_one_fits_no_smaller_batch_is_advised(name: str, wanted: str) -> None:
    with pytest.raises(DoesNotFitError, match=wanted) as refused:
        check(name, gib=0.9 * need(name))
    assert "give accumulate" not in str(refused.value)
    assert "or generator.task_loss.batch_size" not in str(refused.value)


def test_activations_that_are_computed_again_or_halved_are_not_counted() -> None:
    with pytest.raises(DoesNotFitError):
        check(gib=40 * need())
    check(gib=40 * need(), precision="bf16")
    check(gib=40 * need(), activation_checkpointing=True)


def on_cpus(num_workers: int, *nodes: dict[str, float]) -> int | None:
    return declared_memory(TrainConfig(num_workers=num_workers, device="cpu"), Nodes(alive=nodes, most=nodes))


def test_workers_share_what_nodes_declare_as_is_best_for_them() -> None:
    large, small = {"CPU": 8.0, "memory": 70.0, "object_store_memory": 30.0}, {"CPU": 2.0, "memory": 40.0}
    assert on_cpus(2, large) == 50
    assert on_cpus(3, large, small) == 40
    assert on_cpus(4, large, small) == 33
    assert on_cpus(10, large, small) == 12
    assert on_cpus(2, large, {"CPU": 2.0}) is None  # A node of unknown memory may hold them.
    assert on_cpus(2, large, {"memory": 1.0}) == 50


def test_a_share_is_the_most_that_any_placing_gives() -> None:
    nodes = [(100, 3), (61, 2), (30, 5)]
    for num_workers in range(1, 11):
        placings = itertools.product(*(range(slots + 1) for _, slots in nodes))
        shares = [
            min(memory // count for (memory, _), count in zip(nodes, counts, strict=True) if count)
            for counts in placings
            if sum(counts) == num_workers
        ]
        assert max_min_share(nodes, num_workers) == max(shares)


def test_gpus_have_the_memory_of_their_kind() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0, "accelerator_type:T4": 1.0}, {"GPU": 1.0, "accelerator_type:H100": 1.0}]

    def of(num_workers: int, nodes: list[dict[str, float]]) -> int | None:
        return declared_memory(TrainConfig(num_workers=num_workers, device="cuda"), Nodes(alive=nodes, most=nodes))

    assert (of(1, nodes), of(2, nodes)) == (96 * 10**9, 16 * 10**9)
    assert of(1, [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:XYZ": 1.0}]) is None
    assert of(4, nodes) is None or of(4, nodes) == 16 * 10**9


def test_nothing_is_declared_of_nodes_to_come_that_nobody_knows() -> None:
    nodes = Nodes(alive=[{"CPU": 1.0, "memory": 100.0}], most=None)
    assert declared_memory(TrainConfig(num_workers=4, device="cpu"), nodes) is None


def test_a_run_is_refused_before_anything_is_trained(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(megabytes: float) -> None:
        monkeypatch.setattr("raywgen.training.workers.free_memory", lambda *_: int(megabytes * 2**20))

    few = {"num_steps": 2, "batch_size": 4}
    settings = {"network": _NETWORK, "regression": few, "task_loss": few}
    shared = {"method": "direct", "generator": settings, "num_workers": 0, "log_every": 1}
    shared |= {"corpus": zoo_corpus.location, "out": str(tmp_path / "out")}
    config = merge_config(TrainConfig, [("run", shared)])
    free(0.1)
    with pytest.raises(DoesNotFitError, match=r"stage 'regression' of direct does not fit: .* give more workers"):
        launch([config])
    free(1.75)
    with pytest.raises(DoesNotFitError, match="stage 'task_loss' of direct runs whole networks"):
        launch([config])
    assert read_metrics(config.out) == []
    free(10.0)
    launch([config])
    assert len(read_metrics(config.out)) == 4


def many_at_once(corpus: Corpus, out: Path) -> TrainConfig:
    """A run whose last stage takes terabytes."""
    settings = {
        "network": _NETWORK,
        "regression": _STEPS | {"batch_size": 4},
        "task_loss": _STEPS | {"batch_size": 10**8},
    }
    shared = {"method": "direct", "generator": settings, "num_workers": 2, "device": "cpu", "max_failures": 2}
    return merge_config(TrainConfig, [("run", shared | {"corpus": corpus.location, "out": str(out)})])


def test_no_worker_starts_where_the_nodes_declare_too_little_memory(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("raywgen.training.launcher")
    node = {"CPU": 4.0, "memory": 2.0**33}
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(module, "connected_nodes", lambda _: Nodes(alive=[node], most=[node]))
    monkeypatch.setattr(module, "train_on_ray", lambda *_: pytest.fail("workers have started"))
    config = many_at_once(zoo_corpus, tmp_path / "out")
    with pytest.raises(DoesNotFitError, match=r"stage 'task_loss' .* but a worker has 4 GiB beside its parameters"):
        launch([config])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_refusal_by_the_workers_is_not_tried_again(zoo_corpus: Corpus, tmp_path: Path) -> None:
    import ray

    ray.init(address="local", num_cpus=3, _memory=9 * 10**13, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(DoesNotFitError, match=r"stage 'task_loss' .* but a worker has"):
            launch([many_at_once(zoo_corpus, tmp_path)])
    finally:
        ray.shutdown()
    assert read_metrics(tmp_path) == []
