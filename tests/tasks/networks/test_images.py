from __future__ import annotations

import pytest
import torch

from raywgen.tasks import TaskError
from raywgen.tasks.networks.images import as_images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [None, 6])
def test_rows_are_the_images_they_were_flattened_from(channels: int, side: int | None) -> None:
    images = torch.randn(4, channels, 6, 6)
    assert torch.equal(as_images(images.flatten(1), channels, side), images)
    assert as_images(images, channels, side) is images


def test_a_network_of_any_size_takes_oblong_images() -> None:
    assert as_images(torch.zeros(2, 3, 5, 9), 3).shape == (2, 3, 5, 9)


@pytest.mark.parametrize(
    ("shape", "side"),
    [
        ((2, 1, 6, 6), 6),
        ((2, 3, 6, 6), 7),
        ((2, 3, 6, 7), 6),
        ((2, 3 * 36 + 1), None),
        ((2, 3 * 36), 7),
        ((2, 36), 6),
        ((3, 6, 6), None),
        ((36,), None),
    ],
)
def test_other_shapes_are_refused_with_the_right_one(shape: tuple[int, ...], side: int | None) -> None:
    with pytest.raises(TaskError, match=r"inputs of shape \(.*this network takes \(S, 3, .*flattened to \(S, .*resize"):
        as_images(torch.zeros(shape), 3, side)
