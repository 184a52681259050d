"""Shows how checkpoints of your own become a generator that writes new ones.

It trains small perceptrons on scikit-learn's digits by plain PyTorch, takes their files into a corpus, trains IGPG on
the weights alone, and fills a fresh network. Put your own files in place of `train_networks`: any folder of
`.safetensors` or `.pt` files. It needs no download. It takes about 80 seconds of one
core.

    python examples/own_checkpoints.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import raywgen
from raywgen.training import load_train_config

PIXELS, DIGITS = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
IMAGES, NUM_TRAINING = PIXELS.float() / 16, 1200


def perceptron() -> nn.Sequential:
    """A perceptron of 1,210 values."""
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def train_networks(folder: Path, num_networks: int, num_steps: int) -> None:
    """Trains networks from one start on different draws of the images, and saves each."""
    torch.manual_seed(0)
    start = perceptron().state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_networks):
        network = perceptron()
        network.load_state_dict(start)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(num_steps):
            batch = torch.randint(NUM_TRAINING, (64,))
            loss = nn.functional.cross_entropy(network(IMAGES[batch]), DIGITS[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.save(network.state_dict(), folder / f"network-{number:03d}.pt")


def accuracy(network: nn.Module) -> float:
    """The share of the images kept for testing that a network answers rightly."""
    with torch.no_grad():
        return float((network(IMAGES[NUM_TRAINING:]).argmax(1) == DIGITS[NUM_TRAINING:]).float().mean())


def main(
    out: str = "runs/own-checkpoints", num_networks: int = 64, num_steps: int = 300, settings: tuple[str, ...] = ()
) -> float:
    """Runs all steps into a folder, and returns the accuracy of the generated network."""
    root = Path(out)
    if not (root / "files").exists():
        train_networks(root / "files", num_networks, num_steps)
    corpus = raywgen.build_corpus(root / "files", root / "corpus", distributed=False)
    print(f"{corpus.location}: {len(corpus)} checkpoints")

    overrides = [f"corpus={corpus.location}", f"out={root / 'igpg'}", "num_workers=0", *settings]
    overrides += ["generator.task_loss.num_steps=0"]  # Weights alone do not say what the task is.
    generator = raywgen.train(load_train_config("igpg", overrides))

    network = generator.fill(perceptron())
    stored = perceptron()
    stored.load_state_dict(torch.load(root / "files" / "network-000.pt", weights_only=True))
    print(f"accuracy: generated {accuracy(network):.3f}, stored {accuracy(stored):.3f}, guessing 0.1")
    return accuracy(network)


if __name__ == "__main__":
    main()
