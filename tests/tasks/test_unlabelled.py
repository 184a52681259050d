"""Unlabelled inputs from every kind of file: drawn at random, in even batches, never held whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raywgen.tasks.base import TaskError
from raywgen.tasks.images import normalise
from raywgen.tasks.unlabelled import UnlabelledInputs, open_unlabelled
from tests.tasks.test_images import IMAGE, encoded, random_pixels

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYWGEN_CACHE", str(folder))
    return folder


def rows_of(inputs: UnlabelledInputs, batch_size: int = 4) -> list[bytes]:
    batches = list(inputs.batches(batch_size, MEAN, STD))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    return [row.numpy().tobytes() for batch in batches for row in batch]


def test_each_kind_of_file_gives_the_same_inputs(tmp_path: Path, cache: Path) -> None:
    pixels = random_pixels(11, 8, 8, 3)
    table = pa.table({"image": pa.array([{"bytes": encoded(one), "path": None} for one in pixels], IMAGE)})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=3)
    for number, one in enumerate(pixels):
        place = tmp_path / "folder" / ("." if number < 4 else "inside") / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(one))
    np.savez_compressed(tmp_path / "last.npz", x=pixels, y=np.zeros(11))
    np.savez(tmp_path / "first.npz", only=pixels.transpose(0, 3, 1, 2))
    np.save(tmp_path / "plain.npy", pixels)
    expected = sorted(
        row.numpy().tobytes() for row in normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), mean=MEAN, std=STD)
    )
    for name in ("images.parquet", "folder", "last.npz", "first.npz", "plain.npy"):
        found = rows_of(open_unlabelled(tmp_path / name))
        assert found != expected, f"{name}: the order is not random"
        assert sorted(found) == expected, name
    assert [path.name[:6] for path in cache.iterdir()] == ["images"] * 2, "unpacked arrays are removed at once"


def test_a_draw_is_without_replacement_and_follows_its_seed(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float64).reshape(20, 3)
    np.save(tmp_path / "x.npy", values)
    drawn = [rows_of(open_unlabelled(tmp_path / "x.npy", num=7, seed=seed), 3) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0]) != sorted(drawn[2])
    assert len(set(drawn[0])) == 7
    assert set(drawn[0]) <= {row.tobytes() for row in values.astype(np.float32)}
    assert len(open_unlabelled(tmp_path / "x.npy", num=99)) == 20


def test_grey_arrays_are_images_and_images_are_resized(tmp_path: Path) -> None:
    np.save(tmp_path / "grey.npy", random_pixels(3, 5, 5))
    assert open_unlabelled(tmp_path / "grey.npy").stored.shape == (3, 1, 5, 5)
    (tmp_path / "folder").mkdir()
    for number, side in enumerate((6, 9)):
        (tmp_path / "folder" / f"{number}.png").write_bytes(encoded(random_pixels(1, side, side)[0]))
    assert open_unlabelled(tmp_path / "folder", size=4, channels=3).stored.shape == (2, 3, 4, 4)
    with pytest.raises(TaskError, match="the first image 6x6 with 1 channel; give size="):
        open_unlabelled(tmp_path / "folder")


def test_a_constant_channel_is_only_shifted(tmp_path: Path) -> None:
    pixels = np.full((2, 3, 4, 4), 255, dtype=np.uint8)
    np.save(tmp_path / "white.npy", pixels)
    inputs = open_unlabelled(tmp_path / "white.npy")
    mean, std = inputs.pixel_statistics()
    assert (mean, std) == ((1.0,) * 3, (0.0,) * 3)
    assert bool((next(inputs.batches(2, mean, std)).abs() < 1e-6).all())


def test_what_cannot_be_used_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    np.savez(tmp_path / "names.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    np.save(tmp_path / "flat.npy", np.zeros(4))
    np.save(tmp_path / "odd.npy", np.zeros((2, 5, 5, 7), dtype=np.uint8))
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    np.save(tmp_path / "nan.npy", np.array([[1.0, 2.0], [np.nan, 1.0], [3.0, 4.0]]))
    np.save(tmp_path / "fine.npy", np.zeros((2, 2)))
    np.savez_compressed(tmp_path / "cut.npz", x=random_pixels(40, 8, 8))
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    broken = bytearray(content)
    broken[200:400] = bytes(200)
    (tmp_path / "broken.npz").write_bytes(broken)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("1,2")
    pq.write_table(pa.table({"y": [1, 2]}), tmp_path / "labels.parquet")
    for name, said in {
        "names.npz": "give an array x",
        "flat.npy": "give numbers of shape",
        "odd.npy": "with 1 or 3 channels",
        "words.npy": "give numbers of shape",
        "cut.npz": "give an .npy file, or an .npz file",
        "broken.npz": "give an .npy file, or an .npz file",
        "empty": "holds no PNG or JPEG files",
        "text.csv": "this kind of file is not read; give a Parquet file",
        "labels.parquet": "has no column 'image'",
        "none.parquet": "there is no such file",
    }.items():
        with pytest.raises(TaskError) as refused:
            open_unlabelled(tmp_path / name)
        assert said in str(refused.value), refused.value
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(TaskError, match=r"input 1 holds NaN or infinity; drop it"):
        list(open_unlabelled(tmp_path / "nan.npy").batches(3))
    with pytest.raises(TaskError, match="arrays are taken as they are"):
        open_unlabelled(tmp_path / "fine.npy", size=8)
