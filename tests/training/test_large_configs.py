"""The shipped configs for large architectures, shrunk: two real workers under ZeRO-3, windows, averages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from raywgen.corpus import Corpus
from raywgen.generators.bundle import load_bundle
from raywgen.training import launch, load_train_config, read_metrics

ROOT = Path(__file__).parents[2] / "configs"
SMALL_NETWORK = "generator.network={kind: chunks, chunk_length: 8, window: 4, width: 32, num_layers: 1, num_heads: 2}"
SHRUNK = {
    "igpg": [
        "generator.tokenizer={num_steps: 1, batch_size: 4, width: 16, window: 4}",
        "generator.tokenizer.quantiser={num_levels: 2, num_codes: 8}",
        "generator.prior={num_steps: 3, batch_size: 4, width: 32, num_layers: 1, window: 8}",
        "generator.prior={num_heads: 2, num_kv_heads: 1}",
    ],
    "mcdi": [SMALL_NETWORK, "generator.diffusion.num_targets=2", "generator.denoiser={num_steps: 3, batch_size: 4}"],
    "lohp": [
        SMALL_NETWORK,
        "generator.path={num_steps: 4, length: 2}",
        "generator.sampling.num_steps=2",
        "generator.policy={num_steps: 3, batch_size: 4}",
    ],
}


def shrunk(method: str, corpus: Corpus, out: Path) -> list[str]:
    run = [f"corpus={corpus.location}", f"out={out}", "num_workers=2", "device=cpu", "precision=fp32", "log_every=1"]
    return [*run, "num_condition_samples=4", "num_query_samples=4", *SHRUNK[method]]


@pytest.mark.parametrize("name", ["vit-l", "resnet-101"])
@pytest.mark.parametrize("method", SHRUNK)
def test_they_shard_parameters_and_see_windows_of_networks_of_any_size(
    method: str, name: str, zoo_corpus: Corpus, tmp_path: Path
) -> None:
    path = str(ROOT / method / f"{name}.yaml")
    config = load_train_config(path, [])
    assert (config.method, config.zero_stage, config.device) == (method, 3, "cuda")
    assert config.min_workers >= 8
    small = load_train_config(path, shrunk(method, zoo_corpus, tmp_path))
    assert (small.zero_stage, small.num_workers, small.activation_checkpointing) == (3, 2, True)


@pytest.fixture(scope="module")
def trained(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each method, which the same two workers train one after another."""
    import ray

    root = tmp_path_factory.mktemp("trained")
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        launch(
            [
                load_train_config(str(ROOT / method / "vit-l.yaml"), shrunk(method, zoo_corpus, root / method))
                for method in SHRUNK
            ]
        )
    finally:
        ray.shutdown()
    return root


@pytest.mark.slow
@pytest.mark.parametrize("method", SHRUNK)
def test_they_train_on_two_workers_once_they_are_small(method: str, trained: Path) -> None:
    rows = read_metrics(trained / method)
    assert len(rows) >= 3
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert load_bundle(trained / method / "generator").method == method
