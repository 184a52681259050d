from __future__ import annotations

import torch

from raywgen.tasks.ink import paper, usual_paper


def test_paper_is_what_most_pixels_are() -> None:
    drawing = torch.full((2, 1, 4, 4), 252, dtype=torch.uint8)
    drawing[:, :, 1, :3] = 0
    assert paper(drawing) == "white"
    assert paper(255 - drawing) == "black"
    photograph = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert paper(photograph) is None


def test_the_paper_of_data_follows_from_their_mean() -> None:
    # Omniglot, MNIST, CIFAR-10.
    assert [usual_paper(mean) for mean in ((0.92,), (0.13,), (0.49, 0.48, 0.45))] == ["white", "black", None]
