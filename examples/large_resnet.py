"""Shows how a network that is too large to be generated at once is written piece by piece, and loaded.

It takes checkpoints of a ResNet into a corpus, trains IGPG on windows of them, writes a new network in pieces straight
into a `.safetensors` file, and loads it with `strict=True`. Name a folder of your own checkpoints of torchvision's
ResNet-101 as the first argument; without one it makes two of random values, which shows the way and the sizes (44.5
million values each, 180 MB on the disk) but no accuracy. It needs no download and about 1.5 GB of memory. It takes
about three minutes of one core, most of them to write the values: `OMP_NUM_THREADS=1 time python
examples/large_resnet.py` said 185 s of user and 5 s of system time on an AMD EPYC, without a GPU. A generator that is
worth having takes GPUs (`configs/igpg/resnet-101.yaml`).

    python examples/large_resnet.py [CHECKPOINTS]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import raywgen
from raywgen.tasks import build_network
from raywgen.training import load_train_config
from raywgen.weights import load_state_dict, save_state_dict

RESNET = {"name": "resnet101"}
# One code for 256 values is fast to write and far from good; `configs/igpg/resnet-101.yaml` spends 8 on 16 values.
SETTINGS = (
    "generator.tokenizer.chunk_length=256",
    "generator.tokenizer.window=256",
    "generator.tokenizer.quantiser.num_levels=1",
    "generator.tokenizer.num_steps=20",
    "generator.tokenizer.batch_size=8",
    "generator.prior.width=64",
    "generator.prior.num_layers=2",
    "generator.prior.window=64",
    "generator.prior.num_steps=20",
    "generator.prior.batch_size=8",
    "generator.task_loss.num_steps=0",
)


def random_checkpoints(folder: Path, recipe: dict[str, Any], num: int = 2) -> None:
    """Writes freshly initialised networks, unless an earlier call did."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for seed in range(num):
        torch.manual_seed(seed)
        save_state_dict(build_network(recipe).state_dict(), folder / f"random-{seed}.safetensors", {})


def main(
    checkpoints: str = "",
    out: str = "runs/large-resnet",
    recipe: dict[str, Any] = RESNET,
    settings: tuple[str, ...] = SETTINGS,
    piece_values: int = 1 << 20,
) -> str:
    """Runs all steps into a folder, and returns the path of the network that was written."""
    root = Path(out)
    if not checkpoints:
        checkpoints = str(root / "checkpoints")
        random_checkpoints(Path(checkpoints), recipe)
    corpus = raywgen.build_corpus(checkpoints, root / "corpus", distributed=False)

    overrides = [f"corpus={corpus.location}", f"out={root / 'igpg'}", "num_workers=0", *settings]
    raywgen.train(load_train_config("igpg", overrides))

    (network,) = raywgen.generate(
        generator=str(root / "igpg"),
        corpus=corpus.location,
        out=str(root / "networks"),
        try_on_samples=False,
        piece_values=piece_values,
    )
    module = build_network(recipe)
    module.load_state_dict(load_state_dict(network.path), strict=True)
    num_values = sum(parameter.numel() for parameter in module.parameters())
    print(f"{network.path}: {num_values:,} parameters, loaded with strict=True")
    return network.path


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
