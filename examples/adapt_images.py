"""Shows how a folder of a few labelled images becomes a classifier without gradients or training.

It trains an encoder and a zoo of linear heads on scikit-learn's digits, and Mc-Di on this zoo. Then it writes a head
for digits of your own: a folder with one folder of images for each class, as the first argument; without one it writes
such a folder of the digits 3, 5 and 8. It needs no download. It takes about 20 seconds of one core.

    python examples/adapt_images.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import raywgen
from raywgen.tasks.encoder_training import EncoderConfig, train_encoder
from raywgen.zoo import ZooConfig, train_zoo
from raywgen.zoo.config import ZooTasks

WAY, SHOT, WIDTH, SIZE = 3, 5, 32, 16


def class_folders(root: Path, classes: tuple[int, ...] = (3, 5, 8)) -> str:
    """Writes a few images of each class into a folder of its own."""
    pixels, digits = (np.asarray(part) for part in load_digits(return_X_y=True))
    for label in classes:
        folder = root / f"digit-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(pixels[digits == label][:SHOT]):
            Image.fromarray((image.reshape(8, 8) * 255 / 16).astype("uint8")).save(folder / f"{number}.png")
    return str(root)


def main(
    support: str = "",
    out: str = "runs/adapt-images",
    num_episodes: int = 300,
    num_tasks: int = 400,
    num_steps: int = 300,
) -> tuple[str, ...]:
    """Runs all steps into a folder, and returns the classes of the head that was written."""
    root = Path(out)
    images: dict[str, Any] = {"path": "digits", "size": SIZE, "channels": 1}
    encoder = EncoderConfig(
        **images,
        out=str(root / "encoder"),
        width=WIDTH,
        way=WAY,
        num_episodes=num_episodes,
        validate_every=num_episodes,
    )
    train_encoder(encoder)

    tasks = ZooTasks(
        kind="episodes", **images, encoder=encoder.out, way=WAY, shot=3 * SHOT, num_query=SHOT, rotations=True
    )
    zoo = ZooConfig(
        tasks=tasks,
        networks=[{"name": "head", "num_features": WIDTH, "num_classes": WAY}],
        num_seen_tasks=num_tasks,
        num_validation_tasks=8,
        num_unseen_tasks=8,
        seeds_per_task=1,
        num_steps=60,
        checkpoint_steps=[0, 20, 40, 60],
        num_condition_samples=3 * WAY * SHOT,
    )
    corpus = train_zoo(zoo, str(root / "corpus"), distributed=False)

    raywgen.train(
        "mcdi",
        corpus=corpus.location,
        out=root / "mcdi",
        num_workers=0,
        shot=SHOT,
        generator={"denoiser": {"num_steps": num_steps, "meta": "joint"}},
    )

    support = support or class_folders(root / "support")
    found = raywgen.adapt(generator=root / "mcdi", support=support, out=root / "head.safetensors")
    print(f"{found.path}: a head for {', '.join(found.classes)}, written in {found.generate_ms:.1f} ms")
    if found.on_examples is not None:
        print(found.on_examples.sentence())
    return found.classes


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
