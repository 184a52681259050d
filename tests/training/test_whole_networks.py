"""What stages that run whole networks need, and the refusal of those that do not fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.config import ConfigError, merge_config
from raywgen.corpus import Corpus
from raywgen.generators import Generator, Stage, method
from raywgen.generators.bundle import build_generator
from raywgen.tasks import build_network
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.resource_check import check_whole_networks
from raywgen.training.strategy import StageSizes
from raywgen.weights import KeyedNoise, Layout, Normalizer, WeightBatch
from tests.builders import DATA, condition

pytestmark = pytest.mark.usefixtures("one_thread")
_STEPS: dict[str, Any] = {"num_steps": 1}
_NETWORK = {"kind": "chunks", "width": 64, "window": 16}
_TOKENIZER = _STEPS | {"chunk_length": 16, "width": 16, "quantiser": {"num_levels": 2, "num_codes": 16}}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mcdi": ("mcdi", {"network": _NETWORK, "task_loss": _STEPS}),
    "mcdi_long": ("mcdi", {"network": _NETWORK | {"num_layers": 1}, "task_loss": _STEPS | {"sampling_steps": 4}}),
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
        stage = generator.stages()[-1]
        sizes = StageSizes.measure(stage, [(batch, KeyedNoise(0, batch.sample_index_B))])
        needs.append((batch.layout.num_values, sizes.activation_bytes))
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
    check_whole_networks(stages, [replace(batch.layout)], run, int(gib * 2**30))


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
    with pytest.raises(ConfigError) as refused:
        check(gib=10.1 * need())
    said = str(refused.value)
    assert said.startswith("stage 'task_loss' of direct runs whole networks: those of 3,602 values take at least ")
    assert "64 at once (generator.task_loss.batch_size=64, 1 worker, accumulate=1)" in said
    remedies = re.search(r"accumulate=(\d+), or generator.task_loss.batch_size=(\d+), or (.*), or more memory$", said)
    assert remedies
    assert remedies[3] == "generator.task_loss.num_steps=0, which leaves the stage out"
    check(gib=10.1 * need(), accumulate=int(remedies[1]))
    check(gib=10.1 * need(), batch_size=int(remedies[2]))
    with pytest.raises(ConfigError):
        check(gib=10.1 * need(), batch_size=int(remedies[2]) + 1)
    with pytest.raises(ConfigError):
        check(gib=10.1 * need(), accumulate=int(remedies[1]) - 1)


@pytest.mark.parametrize(("name", "wanted"), [("hypernetwork", "give more memory"), ("direct", "num_steps=0")])
def test_where_not_even_one_fits_no_smaller_batch_is_advised(name: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted) as refused:
        check(name, gib=0.9 * need(name))
    assert "give accumulate" not in str(refused.value)
    assert "or generator.task_loss.batch_size" not in str(refused.value)


def test_activations_that_are_computed_again_or_halved_are_not_counted() -> None:
    with pytest.raises(ConfigError):
        check(gib=40 * need())
    check(gib=40 * need(), precision="bf16")
    check(gib=40 * need(), activation_checkpointing=True)


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
    with pytest.raises(ConfigError, match="stage 'task_loss' of direct runs whole networks"):
        launch([config])
    assert read_metrics(config.out) == []
    free(10.0)
    launch([config])
    assert len(read_metrics(config.out)) == 4
