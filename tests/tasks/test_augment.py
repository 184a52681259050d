from __future__ import annotations

import pytest
import torch

from raywgen.tasks import TaskError
from raywgen.tasks.augment import augment


def images() -> torch.Tensor:
    return torch.rand(30, 2, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.1


def test_flips_are_the_image_or_its_mirror() -> None:
    x = images()
    flipped = augment(x, "flip", 2, seed=0, step=3)
    kinds = [("same" if torch.equal(a, b) else "mirror" if torch.equal(a, b.flip(-1)) else "other")
             for a, b in zip(flipped, x, strict=True)]  # fmt: skip
    assert set(kinds) == {"same", "mirror"}


def test_shifts_move_the_image_and_fill_with_zeros() -> None:
    x = images()
    shifted = augment(x, "shift-1", 2, seed=0, step=0)
    padded = torch.nn.functional.pad(x, [1] * 4)
    found = set()
    for image, before in zip(shifted, padded, strict=True):
        hits = [(r, c) for r in range(3) for c in range(3) if torch.equal(image, before[:, r : r + 6, c : c + 6])]
        assert len(hits) == 1
        found |= set(hits)
    assert len(found) > 5


def test_flat_and_square_images_change_alike_and_steps_differ() -> None:
    x = images()
    flat = augment(x.flatten(1), "flip+shift-2", 2, seed=4, step=9)
    assert torch.equal(flat.view_as(x), augment(x, "flip+shift-2", 2, seed=4, step=9))
    assert not torch.equal(flat, augment(x.flatten(1), "flip+shift-2", 2, seed=4, step=10))
    assert not torch.equal(flat, augment(x.flatten(1), "flip+shift-2", 2, seed=5, step=9))
    # A run's steps are not those of its neighbour a step later.
    assert not torch.equal(flat, augment(x.flatten(1), "flip+shift-2", 2, seed=5, step=8))
    assert augment(x, "", 2, seed=0, step=0) is x


def test_unknown_kinds_and_other_shapes_are_named() -> None:
    with pytest.raises(TaskError, match="unknown kind 'rotate'; give flip, shift-K"):
        augment(images(), "rotate", 2, seed=0, step=0)
    with pytest.raises(TaskError, match="samples of 72 values are no square images of 3 channels"):
        augment(images(), "flip", 3, seed=0, step=0)
