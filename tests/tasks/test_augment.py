from __future__ import annotations

import pytest
import torch

from raywgen.tasks import TaskError
from raywgen.tasks.augment import augment, augment_each, check_augment
from raywgen.weights import KeyedNoise


def images() -> torch.Tensor:
    return torch.rand(30, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.1


def test_flips_are_the_image_or_its_mirror() -> None:
    x = images()
    flipped = augment(x, "flip", seed=0, step=3)
    kinds = [("same" if torch.equal(a, b) else "mirror" if torch.equal(a, b.flip(-1)) else "other")
             for a, b in zip(flipped, x, strict=True)]  # fmt: skip
    assert set(kinds) == {"same", "mirror"}


def test_shifts_move_the_image_and_fill_with_zeros() -> None:
    x = images()
    shifted = augment(x, "shift-1", seed=0, step=0)
    padded = torch.nn.functional.pad(x, [1] * 4)
    found = set()
    for image, before in zip(shifted, padded, strict=True):
        hits = [(r, c) for r in range(3) for c in range(3) if torch.equal(image, before[:, r : r + 6, c : c + 6])]
        assert len(hits) == 1
        found |= set(hits)
    assert len(found) > 5


def test_flat_and_square_images_change_alike_and_steps_differ() -> None:
    x = images()
    flat = augment(x.flatten(1), "flip+shift-2", seed=4, step=9)
    assert torch.equal(flat.view_as(x), augment(x, "flip+shift-2", seed=4, step=9))
    assert not torch.equal(flat, augment(x.flatten(1), "flip+shift-2", seed=4, step=10))
    assert not torch.equal(flat, augment(x.flatten(1), "flip+shift-2", seed=5, step=9))
    # A run's steps are not those of its neighbour a step later.
    assert not torch.equal(flat, augment(x.flatten(1), "flip+shift-2", seed=5, step=8))
    assert augment(x, "", seed=0, step=0) is x


def test_unknown_kinds_and_other_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="augment=flip\\+rotate: unknown kind 'rotate'; give flip, shift-K"):
        check_augment("flip+rotate")
    with pytest.raises(ValueError, match="unknown kind 'rotate'"):
        augment(images(), "rotate", seed=0, step=0)
    with pytest.raises(TaskError, match="samples of 72 values are no square images"):
        augment(torch.rand(2, 72), "flip", seed=0, step=0)


def noise(*samples: int) -> KeyedNoise:
    return KeyedNoise(0, torch.tensor(samples), 7)


def test_images_of_networks_change_by_noise_of_their_own_over_their_background() -> None:
    x_BSF = torch.full((3, 20, 1, 6, 6), -2.0)
    x_BSF[..., 2:4, 2:4] = torch.rand(3, 20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x_BSF = x_BSF.flatten(2)
    changed_BSF = augment_each(x_BSF, "flip+shift-1", noise(4, 5, 6))
    # A part of the batch is changed as in the whole, so that any number of workers trains alike.
    torch.testing.assert_close(changed_BSF[1:2], augment_each(x_BSF[1:2], "flip+shift-1", noise(5)), rtol=0, atol=0)
    assert not torch.equal(changed_BSF, x_BSF)
    # Nothing is lost at the edges, and nothing but background comes in.
    torch.testing.assert_close(changed_BSF.sort(dim=2).values, x_BSF.sort(dim=2).values)
    places = {tuple(each.nonzero().flatten().tolist()) for each in (changed_BSF > -1).flatten(0, 1)}
    assert len(places) == 9
    assert augment_each(x_BSF, "", noise(4, 5, 6)) is x_BSF
