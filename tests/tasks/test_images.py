from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from raywgen.tasks.base import TaskError
from raywgen.tasks.images import channel_statistics, load_digits_images, load_images, normalise
from raywgen.weights.cache import cache_folder

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HUB_FEATURES = {
    "img": {"_type": "Image"},
    "fine_label": {"_type": "ClassLabel", "names": ["cat", "dog", "eel"]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYWGEN_CACHE", str(folder))
    return folder


def real_file(name: str) -> Path:
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, form)
    return target.getvalue()


def random_pixels(num: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def write_table(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    *,
    names: tuple[str, str] = ("image", "label"),
    metadata: dict[str, str] | None = None,
    plain: bool = False,
    **columns: Sequence[Any],
) -> Path:
    if plain:
        image = pa.array(images, pa.binary())
    else:
        image = pa.array([{"bytes": content, "path": None} for content in images], IMAGE)
    table = pa.table({names[0]: image, names[1]: pa.array(labels, pa.int64()), **columns})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=7)
    return path


def hub_metadata() -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": HUB_FEATURES}})}


@pytest.mark.parametrize(("file", "num", "side"), [("mnist-test", 10_000, 28), ("cifar10-test", 10_000, 32)])
def test_real_images_are_what_pillow_makes_of_them(file: str, num: int, side: int) -> None:
    path = real_file(f"{file}.parquet")
    data = load_images(path)
    table = pq.read_table(path)
    expected = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()])
    expected = expected[:, None] if expected.ndim == 3 else expected.transpose(0, 3, 1, 2)
    assert data.x_SCHW.dtype == torch.uint8
    assert data.x_SCHW.shape == (num, expected.shape[1], side, side)
    assert np.array_equal(data.x_SCHW.numpy(), expected)
    assert data.y_S.tolist() == table["label"].to_pylist()
    assert len(data.class_names) == 10
    assert data.class_names[9] == ("9" if file.startswith("mnist") else "truck")
    assert (data.name, data.source, data.licence) == (file, str(path), "unknown")


def test_omniglot_keeps_what_else_is_known_of_each_drawing() -> None:
    path = real_file("omniglot-background.parquet")
    data = load_images(path, size=28, limit=964 * 2)
    assert data.x_SCHW.shape == (964 * 2, 1, 28, 28)
    assert torch.bincount(data.y_S).tolist() == [2] * 964
    assert len(set(data.columns["alphabet"])) == 30
    assert len(set(zip(data.columns["alphabet"], data.columns["character"], strict=True))) == 964
    table = pq.read_table(path)
    stored = set(zip(*(table[name].to_pylist() for name in ("label", "alphabet", "drawer")), strict=True))
    drawn = set(zip(data.y_S.tolist(), data.columns["alphabet"], data.columns["drawer"], strict=True))
    assert drawn <= stored
    assert len(drawn) == len(data.y_S)


def test_a_limited_load_holds_the_same_images_as_the_whole(tmp_path: Path) -> None:
    pixels = random_pixels(60, 4, 4)
    labels = [0] * 5 + [1] * 20 + [2] * 35
    path = write_table(tmp_path / "some.parquet", [encoded(p) for p in pixels], labels, number=list(range(60)))
    data = load_images(path, limit=26, seed=3)
    assert torch.bincount(data.y_S).tolist() in ([5, 10, 11], [5, 11, 10])
    rows = list(data.columns["number"])
    assert rows == sorted(rows)
    assert np.array_equal(data.x_SCHW[:, 0].numpy(), pixels[rows])
    assert data.y_S.tolist() == [labels[row] for row in rows]
    assert list(load_images(path, limit=26, seed=3).columns["number"]) == rows
    assert list(load_images(path, limit=26, seed=4).columns["number"]) != rows
    assert len(load_images(path, limit=1000).y_S) == 60


@pytest.mark.parametrize("plain", [False, True])
def test_the_hubs_own_column_and_class_names_are_understood(tmp_path: Path, plain: bool) -> None:
    pixels = random_pixels(9, 5, 6, 3)
    path = write_table(
        tmp_path / "hub.parquet",
        [encoded(p) for p in pixels],
        [0, 1, 2] * 3,
        names=("img", "fine_label"),
        metadata=hub_metadata(),
        plain=plain,
    )
    data = load_images(path)
    assert np.array_equal(data.x_SCHW.numpy(), pixels.transpose(0, 3, 1, 2))
    assert data.class_names == ("cat", "dog", "eel")
    assert data.columns == {}


def test_a_glob_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    pixels = random_pixels(12, 4, 4)
    images = [encoded(p) for p in pixels]
    for part in (2, 0, 1):
        rows = slice(4 * part, 4 * part + 4)
        write_table(tmp_path / f"train-{part}.parquet", images[rows], [part] * 4, part=[f"p{part}"] * 4)
    write_table(tmp_path / "test-0.parquet", images, [0] * 12, part=["t"] * 12)
    data = load_images(tmp_path / "train-*.parquet")
    assert np.array_equal(data.x_SCHW[:, 0].numpy(), pixels)
    assert data.y_S.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.columns["part"] == ("p0",) * 4 + ("p1",) * 4 + ("p2",) * 4
    # A link that leads round in a circle, and a file deeper than the pattern goes.
    (tmp_path / "all" / "deep").mkdir(parents=True)
    (tmp_path / "all" / "deep" / "again").symlink_to(tmp_path)
    (tmp_path / "all" / "here").symlink_to(tmp_path)
    (tmp_path / "all" / "deep" / "train-2.parquet").symlink_to(tmp_path / "test-0.parquet")
    nested = load_images(f"{tmp_path}/all/he?e/train-[12].parquet")
    assert nested.y_S.tolist() == [1] * 4 + [2] * 4
    by_uri = load_images(f"file://{tmp_path}/train-1.parquet")
    assert np.array_equal(by_uri.x_SCHW[:, 0].numpy(), pixels[4:8])


def test_a_folder_of_class_folders_is_read(tmp_path: Path) -> None:
    pixels = random_pixels(6, 5, 5)
    for place, name in enumerate(["owl/b.png", "owl/a.PNG", "ant/x.png", "ant/y.png", "bee/z.png", "loose.png"]):
        target = tmp_path / "birds" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded(pixels[place]))
    (tmp_path / "birds" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "birds" / "ant" / "again").symlink_to(tmp_path / "birds")
    data = load_images(tmp_path / "birds")
    assert data.class_names == ("ant", "bee", "owl")
    assert data.y_S.tolist() == [0, 0, 1, 2, 2]
    assert np.array_equal(data.x_SCHW[:, 0].numpy(), pixels[[2, 3, 4, 1, 0]])
    assert [Path(path).name for path in data.columns["path"]] == ["x.png", "y.png", "z.png", "a.PNG", "b.png"]
    assert data.name == "birds"


def test_channels_and_size_are_made_as_asked(tmp_path: Path) -> None:
    colour = random_pixels(1, 8, 8, 3)[0]
    grey = random_pixels(1, 16, 12, seed=1)[0]
    path = write_table(tmp_path / "mixed.parquet", [encoded(colour), encoded(grey)], [0, 1])
    with pytest.raises(TaskError, match=r"mixed.parquet row 1 is 16x12 with 1 channel, the first image 8x8 with 3"):
        load_images(path)
    with pytest.raises(TaskError, match="give size="):
        load_images(path, channels=3)
    rgb = load_images(path, size=8, channels=3).x_SCHW
    assert np.array_equal(rgb[0].numpy(), colour.transpose(2, 0, 1))
    assert torch.equal(rgb[1, 0], rgb[1, 1])
    luma = load_images(path, size=8, channels=1).x_SCHW
    assert luma.shape == (2, 1, 8, 8)
    weights = np.array([0.299, 0.587, 0.114])
    assert np.abs(luma[0, 0].numpy() - colour @ weights).max() <= 1
    assert torch.equal(luma[1], rgb[1, :1])


def test_shrinking_averages_over_what_it_drops(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (32, 16))
    path = write_table(tmp_path / "stripes.parquet", [encoded(stripes)], [0])
    inner = load_images(path, size=4).x_SCHW[0, 0, :, 1:3].float()
    # Without antialiasing a stripe is hit or missed, and the result is black or white.
    assert (inner - 127.5).abs().max() < 4


def test_grey_of_one_and_of_sixteen_bits_fills_the_range(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    bits = random_pixels(1, 8, 8)[0] > 127
    path = write_table(tmp_path / "deep.parquet", [encoded(deep), encoded(bits)], [0, 0])
    x = load_images(path).x_SCHW.numpy()
    assert np.array_equal(x[0, 0], np.rint(deep / 257).astype(np.uint8))
    assert np.array_equal(x[1, 0], bits * np.uint8(255))


def test_decoding_happens_once_and_again_where_the_file_has_changed(tmp_path: Path, cache: Path) -> None:
    pixels = random_pixels(3000, 4, 4)
    path = write_table(tmp_path / "a.parquet", [encoded(p) for p in pixels], [0, 1] * 1500)
    progress: list[tuple[int, int]] = []

    def load(**options: Any) -> torch.Tensor:
        progress.clear()
        return load_images(path, on_progress=lambda done, total: progress.append((done, total)), **options).x_SCHW

    first = load()
    assert progress[-1] == (3000, 3000)
    assert len(progress) > 1
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert torch.equal(load(), first)
    assert progress == []
    # A mapped array takes writes for itself: the cache stays as it was.
    load()[0] = 0
    assert torch.equal(load(), first)
    load(size=3)
    assert progress
    load(limit=10, seed=1)
    assert progress[-1] == (10, 10)
    write_table(path, [encoded(255 - p) for p in pixels], [0, 1] * 1500)
    assert torch.equal(load(), 255 - first)
    assert not [name for name in os.listdir(cache) if name.startswith(".")]


def test_the_cache_lies_beside_temporary_files_unless_told(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("RAYWGEN_CACHE")
    assert cache_folder() == Path(tempfile.gettempdir()) / f"raywgen-{os.getuid()}"


def test_a_damaged_cache_file_is_made_again(tmp_path: Path, cache: Path) -> None:
    pixels = random_pixels(20, 6, 6)
    path = write_table(tmp_path / "a.parquet", [encoded(p) for p in pixels], [0] * 20)
    load_images(path)
    (cached,) = cache.iterdir()
    for content in (cached.read_bytes()[:-1], b"", b"nonsense"):
        cached.write_bytes(content)
        assert np.array_equal(load_images(path).x_SCHW[:, 0].numpy(), pixels)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "a.parquet", [encoded(random_pixels(1, 4, 4)[0])], [0])
    monkeypatch.setenv("RAYWGEN_CACHE", str(path / "under-a-file"))
    with pytest.raises(TaskError, match=r"a.parquet/under-a-file.*another folder by RAYWGEN_CACHE"):
        load_images(path)


def test_a_damaged_image_is_named_by_file_and_row(tmp_path: Path, cache: Path) -> None:
    good = [encoded(p) for p in random_pixels(2000, 4, 4)]
    write_table(tmp_path / "p-0.parquet", good[:500], [0] * 500)
    for bad in (b"no image at all", good[0][:-30], good[0][:40] + b"\0" * 30):
        write_table(tmp_path / "p-1.parquet", [*good[500:1717], bad, *good[1718:]], [0] * 1500)
        with pytest.raises(TaskError, match=r"p-1.parquet row 1217 holds a damaged image .*replace it or drop"):
            load_images(tmp_path / "p-*.parquet")
    write_table(tmp_path / "p-1.parquet", [good[0], None], [0, 0])
    with pytest.raises(TaskError, match=r"p-1.parquet row 1 has no image bytes"):
        load_images(tmp_path / "p-*.parquet")
    assert not list(cache.glob("*")), "nothing half-made stays in the cache"


def test_a_damaged_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(encoded(random_pixels(1, 8, 8, 3)[0], "JPEG")[:200])
    with pytest.raises(TaskError, match=r"cat/1.jpg holds a damaged image"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], r"bad.parquet row 1: 'label' is -1; drop"),
        ([None, 0], r"bad.parquet row 0: 'label' is None"),
        ([0, 3], r"label 3 lies beyond the 3 class names"),
    ],
)
def test_labels_that_name_no_class_are_refused(tmp_path: Path, labels: list[int | None], message: str) -> None:
    images = [encoded(p) for p in random_pixels(2, 4, 4)]
    path = write_table(tmp_path / "bad.parquet", images, labels, metadata={"classes": "a,b,c"})
    with pytest.raises(TaskError, match=message):
        load_images(path)


def test_wrong_tables_are_refused_with_the_remedy(tmp_path: Path) -> None:
    image = encoded(random_pixels(1, 4, 4)[0])
    with pytest.raises(TaskError, match=r"no column 'image' \(it has: photo, label\); rename"):
        load_images(write_table(tmp_path / "a.parquet", [image], [0], names=("photo", "label")))
    with pytest.raises(TaskError, match=r"no column 'label' \(it has: image, y\)"):
        load_images(write_table(tmp_path / "b.parquet", [image], [0], names=("image", "y")))
    with pytest.raises(TaskError, match=r"c.parquet has no rows"):
        load_images(write_table(tmp_path / "c.parquet", [], []))
    pq.write_table(pa.table({"image": ["text"], "label": [0]}), tmp_path / "d.parquet")
    with pytest.raises(TaskError, match=r"'image' is string; store encoded PNG or JPEG"):
        load_images(tmp_path / "d.parquet")
    pq.write_table(pa.table({"image": [image], "label": ["cat"]}), tmp_path / "e.parquet")
    with pytest.raises(TaskError, match=r"'label' is string; number the classes"):
        load_images(tmp_path / "e.parquet")
    write_table(tmp_path / "f-0.parquet", [image], [0], metadata={"classes": "a,b"})
    write_table(tmp_path / "f-1.parquet", [image], [0], metadata={"classes": "b,a"})
    with pytest.raises(TaskError, match=r"f-1.parquet and .*f-0.parquet name their classes differently"):
        load_images(tmp_path / "f-*.parquet")


def test_files_that_are_none_are_refused_with_the_remedy(tmp_path: Path) -> None:
    for missing in ("absent.parquet", "absent-*.parquet", "no/such/*/x.parquet"):
        with pytest.raises(TaskError, match="there is no such file or folder"):
            load_images(tmp_path / missing)
    (tmp_path / "zero.parquet").touch()
    (tmp_path / "text.parquet").write_text("not a table " * 50)
    whole = write_table(tmp_path / "cut.parquet", [encoded(p) for p in random_pixels(30, 9, 9)], [0] * 30)
    whole.write_bytes(whole.read_bytes()[:-40])
    for name in ("zero", "text", "cut"):
        with pytest.raises(TaskError, match=rf"{name}.parquet cannot be read as Parquet .*download it again"):
            load_images(tmp_path / f"{name}.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match="holds no class folders with PNG or JPEG files"):
        load_images(tmp_path / "empty")
    with pytest.raises(TaskError, match="unknown://x cannot be reached"):
        load_images("unknown://x")


def test_a_table_with_damaged_pages_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "torn.parquet", [encoded(p) for p in random_pixels(30, 9, 9)], [0] * 30)
    content = bytearray(path.read_bytes())
    content[4:600] = b"\xff" * 596
    path.write_bytes(content)
    with pytest.raises(TaskError, match=r"torn.parquet cannot be read as Parquet"):
        load_images(path)


def test_the_hub_needs_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(TaskError, match=r"needs huggingface_hub; install it by `pip install 'raywgen\[hub\]'`"):
        load_images("hf://datasets/ylecun/mnist/mnist/test-00000-of-00001.parquet")


def test_an_unreachable_hub_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"cannot be reached .*download the file"):
        load_images("hf://datasets/ylecun/mnist/mnist/test-00000-of-00001.parquet")


@pytest.mark.parametrize("options", [{"size": 0}, {"limit": 0}, {"channels": 2}, {"limit": -3}, {"seed": -1}])
def test_senseless_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        load_images(tmp_path, **options)


def test_digits_are_scikit_learns() -> None:
    data = load_digits_images()
    values, digits = load_digits(return_X_y=True)
    assert data.x_SCHW.shape == (1797, 1, 8, 8)
    assert data.x_SCHW.dtype == torch.uint8
    assert int(data.x_SCHW.max()) == 255
    # Sixteen levels survive the stretch to bytes.
    assert np.array_equal(np.rint(data.x_SCHW.flatten(1).numpy() / 255 * 16), values)
    assert data.y_S.tolist() == np.asarray(digits).tolist()
    assert data.class_names == tuple("0123456789")


def test_statistics_and_normalisation_agree_with_float64() -> None:
    x = torch.from_numpy(random_pixels(50, 3, 6, 5))
    x[:, 1] //= 3
    mean, std = channel_statistics(x)
    exact = x.double() / 255
    np.testing.assert_allclose(mean, exact.mean(dim=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, exact.std(dim=(0, 2, 3), correction=0), rtol=1e-12)
    measured = normalise(x)
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(measured.std(dim=(0, 2, 3), correction=0), torch.ones(3))
    given = normalise(x, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    expected = (exact - torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).reshape(
        3, 1, 1
    )
    torch.testing.assert_close(given, expected.float())
    torch.testing.assert_close(normalise(x.reshape(5, 10, 3, 6, 5)).reshape(x.shape), measured)


def test_normalisation_of_constant_and_of_wrong_pixels() -> None:
    constant = torch.full((4, 1, 3, 3), 51, dtype=torch.uint8)
    torch.testing.assert_close(normalise(constant), torch.zeros(4, 1, 3, 3))
    with pytest.raises(TaskError, match="give 1 of each"):
        normalise(constant, mean=(0.1, 0.2), std=(1, 1))
    with pytest.raises(TaskError, match="std above 0"):
        normalise(constant, std=(0.0,))
    with pytest.raises(TaskError, match="give uint8"):
        normalise(constant.float())
