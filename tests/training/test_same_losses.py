"""Every method's losses and networks, to the last bit those of the commit before the renames and moves.

The numbers stand until the last of these changes is made. They hold for one kind of processor and one release of
torch, so the test compares on these alone; `python -m tests.training.test_same_losses` writes them anew.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raywgen.config import merge_config
from raywgen.corpus import Corpus
from raywgen.generation import GenerateConfig, generate
from raywgen.training import TrainConfig, launch, read_metrics
from tests.conftest import TINY_ZOO, make_zoo

_NUMBERS = Path(__file__).parent / "same_losses.json"
_STAGE: dict[str, Any] = {"num_steps": 4, "batch_size": 8}
_IGPG = {
    "tokenizer": _STAGE | {"quantiser": {"num_levels": 3, "num_codes": 16}, "width": 16},
    "prior": _STAGE | {"width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
    "task_loss": _STAGE,
}
_NETWORK = {"width": 16, "num_layers": 1, "num_heads": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "igpg": ("igpg", _IGPG),
    "igpg_scale_tokens": ("igpg", _IGPG | {"tokenizer": _IGPG["tokenizer"] | {"scales": "filter"}}),
    "igpg_windows": ("igpg", _IGPG | {"prior": _IGPG["prior"] | {"window": 8}}),
    "mcdi": ("mcdi", {"network": _NETWORK, "denoiser": _STAGE, "task_loss": _STAGE, "diffusion": {"num_targets": 2}}),
    "mcdi_latents": (
        "mcdi",
        {
            "network": _NETWORK | {"kind": "latents"},
            "denoiser": _STAGE,
            "tokenizer": _STAGE | {"chunk_length": 32, "quantiser": {"num_levels": 2, "num_codes": 16}, "width": 16},
            "diffusion": {"num_targets": 2},
            "sampling": {"sampler": "stochastic", "num_steps": 5},
        },
    ),
    "lohp": (
        "lohp",
        {
            "path": {"num_steps": 4, "length": 2},
            "sampling": {"num_steps": 2},
            "network": _NETWORK,
            "policy": _STAGE | {"replay_size": 2},
        },
    ),
    "direct": ("direct", {"network": _NETWORK, "regression": _STAGE, "task_loss": _STAGE}),
    "hypernetwork": ("hypernetwork", {"width": 16, "task_loss": _STAGE}),
}


def _machine() -> str:
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def numbers(name: str, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Losses of all steps, and the networks that are generated thereafter."""
    method, settings = RUNS[name]
    out = str(folder / name)
    settings = {"method": method, "generator": settings, "log_every": 1, "validate_every": 2, "num_workers": 0}
    settings |= {"corpus": corpus.location, "out": out, "num_condition_samples": 16, "num_query_samples": 16}
    launch([merge_config(TrainConfig, [(name, settings)])])
    rows = read_metrics(out)
    generate(
        GenerateConfig(generator=out, corpus=corpus.location, out=f"{out}/networks", limit=2, best_of=2, temperature=1)
    )
    digest = hashlib.sha256()
    written = sorted(Path(out, "networks").glob("*.safetensors"))
    assert len(written) == 4
    for path in written:
        for key, tensor in sorted(load_file(path).items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
    losses = [[row["loss"].hex(), row.get("val_loss", 0.0).hex()] for row in rows]
    return {"losses": losses, "networks": digest.hexdigest()}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_losses_and_networks_are_those_of_before(name: str, zoo_corpus: Corpus, tmp_path: Path) -> None:
    before = json.loads(_NUMBERS.read_text())
    if before["machine"] != _machine():
        pytest.skip(f"the numbers are of {before['machine']}, this is {_machine()}")
    assert numbers(name, zoo_corpus, tmp_path) == before["runs"][name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        zoo = make_zoo(TINY_ZOO, f"{folder}/zoo")
        runs = {name: numbers(name, zoo, Path(folder)) for name in RUNS}
    _NUMBERS.write_text(json.dumps({"machine": _machine(), "runs": runs}, indent=1) + "\n")
