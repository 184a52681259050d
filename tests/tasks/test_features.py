from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from raywgen.tasks import TaskError, build_task
from raywgen.tasks.encoders import FrozenEncoder, load_encoder
from raywgen.tasks.features import encode_images, encode_inputs, turned_classes
from raywgen.tasks.images import ImageData, channel_statistics, load_digits_images, normalise
from raywgen.weights.cache import FOLDER

ENCODER = "tests.tasks.test_features:Linear"


class Linear(nn.Linear):
    """Three random projections."""

    def __init__(self) -> None:
        super().__init__(16, 3)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def images(num: int = 11, height: int = 4) -> ImageData:
    x_SCHW = torch.randint(256, (num, 1, height, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawers = tuple(f"d{row}" for row in range(num))
    y_S = torch.arange(num) % 3
    return ImageData(
        name="noise", x_SCHW=x_SCHW, y_S=y_S, class_names=("a", "b", "c"), columns={"drawer": drawers}, source="test"
    )


def test_features_of_turned_images_are_those_of_turned_pixels() -> None:
    data = images()
    features = encode_images(data, ENCODER, rotations=True)
    assert features.x_SCHW.shape == (44, 3, 1, 1)
    assert features.x_SCHW.dtype == torch.float32
    mean, std = channel_statistics(data.x_SCHW)
    encoder = load_encoder(ENCODER)
    for turn in range(4):
        rows = slice(11 * turn, 11 * (turn + 1))
        turned_SCHW = torch.rot90(data.x_SCHW, turn, (-2, -1))
        expected_SE = encoder(normalise(turned_SCHW, mean=mean, std=std).flatten(1))
        torch.testing.assert_close(features.x_SCHW[rows].flatten(1), expected_SE)
        assert torch.equal(features.y_S[rows], data.y_S + 3 * turn)
        assert features.columns["drawer"][rows] == data.columns["drawer"]
    assert features.class_names[:5] == ("a", "b", "c", "a turned by 90", "b turned by 90")
    assert len(features.class_names) == 12
    assert turned_classes([0, 2], 3, rotations=True) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert turned_classes([0, 2], 3, rotations=False) == [0, 2]


def test_other_images_of_one_name_have_other_features() -> None:
    data = images()
    other = dataclasses.replace(data, x_SCHW=data.x_SCHW.flip(0))
    statistics = channel_statistics(data.x_SCHW)
    first, second = (encode_images(one, ENCODER, rotations=False, statistics=statistics) for one in (data, other))
    torch.testing.assert_close(second.x_SCHW, first.x_SCHW.flip(0))
    assert not torch.equal(second.x_SCHW, first.x_SCHW)


def test_images_are_encoded_once(cache: Path) -> None:
    progress: list[tuple[int, int]] = []

    def encoded(data: ImageData, encoder: str | FrozenEncoder = ENCODER, rotations: bool = False) -> torch.Tensor:
        return encode_images(
            data, encoder, rotations=rotations, on_progress=lambda done, total: progress.append((done, total))
        ).x_SCHW

    data = images()
    first = encoded(data)
    assert progress == [(11, 11)]
    assert torch.equal(encoded(data), first)
    assert len(progress) == len(list(cache.iterdir())) == 1
    changed = images()
    changed.x_SCHW[3, 0, 1, 1] ^= 1
    other = FrozenEncoder(nn.Linear(16, 3), name="other", identity="")
    assert not torch.equal(encoded(changed), first)
    assert not torch.equal(encoded(data, other), first)
    assert torch.equal(encoded(data, rotations=True)[:11], first)
    assert len(progress) == 1 + 1 + 1 + 4
    next(cache.glob("*.npy")).write_bytes(b"damaged")
    assert torch.equal(encoded(data), first)


def test_large_data_is_encoded_in_batches() -> None:
    data = images(num=600)
    features_SE = encode_images(data, ENCODER, rotations=False).x_SCHW.flatten(1)
    mean, std = channel_statistics(data.x_SCHW)
    torch.testing.assert_close(
        features_SE, load_encoder(ENCODER)(normalise(data.x_SCHW, mean=mean, std=std).flatten(1))
    )


def test_inputs_of_tasks_have_the_features_of_their_images() -> None:
    task = build_task({"name": "images", "path": "digits"})
    encoder = FrozenEncoder(nn.Linear(64, 5), name="own", identity="")
    features_SE = encode_inputs(task.test_x_SF, encoder)
    assert torch.equal(encode_inputs(task.test_x_SF, encoder), features_SE)
    every_SE = encode_images(load_digits_images(), encoder, rotations=False).x_SCHW.flatten(1)
    distance_S = torch.cdist(features_SE.double(), every_SE.double()).min(dim=1).values
    assert float(distance_S.max()) < 1e-4


def test_what_cannot_be_encoded_is_named() -> None:
    with pytest.raises(TaskError, match="images are 5x4; load square ones"):
        encode_images(images(height=5), ENCODER, rotations=True)
    with pytest.raises(TaskError, match="does not take samples of 20 values"):
        encode_images(images(height=5), ENCODER, rotations=False)


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    with pytest.raises(TaskError, match=f"features cannot be kept.*{FOLDER}"):
        encode_images(images(), ENCODER, rotations=False)
