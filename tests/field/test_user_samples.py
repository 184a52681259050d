"""Labelled samples in whatever a user holds them, wherever `data=` is taken."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from raywgen.generation import ConditionError, TrainedGenerator
from raywgen.tasks.preprocessing import InputForm
from raywgen.tasks.user_data import read_data
from tests.builders import condition, igpg, network

NUM = 12
FORM = InputForm(size=8, channels=1, mean=(0.25,), std=(0.5,))
ASK = "Is feature 0 above zero?"


def samples() -> tuple[Tensor, Tensor]:
    drawn = condition(1, num_samples=NUM)
    return drawn.samples_BSF[0], drawn.labels_BS[0]


class Pairs(Dataset):
    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Any:
        x, y = samples()
        return x[index], int(y[index])


class Mappings(Pairs):
    def __getitem__(self, index: int) -> Any:
        x, label = super().__getitem__(index)
        return {"label": label, "pixel_values": x}


class Broken(Pairs):
    def __getitem__(self, index: int) -> Any:
        raise ZeroDivisionError("my own mistake")


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.zeros(6), 0


class HubLike:
    """A Hugging Face data set as far as it is used here."""

    def __init__(self) -> None:
        self.column_names = ["x", "label"]

    def __getitem__(self, name: str) -> list[Any]:
        return samples()[name == "label"].tolist()


def _frame() -> pd.DataFrame:
    x, y = samples()
    return pd.DataFrame({**{f"f{place}": x[:, place].numpy() for place in range(6)}, "label": y.numpy()})


def _npz(folder: Path) -> str:
    x, y = samples()
    np.savez(folder / "mine.npz", X=x.numpy(), Y=y.numpy())
    return str(folder / "mine.npz")


def _parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pandas(_frame()), folder / "mine.parquet")
    return folder / "mine.parquet"


KINDS: dict[str, Callable[[Path], Any]] = {
    "tensors": lambda _: samples(),
    "a list of two": lambda _: list(samples()),
    "arrays": lambda _: tuple(part.numpy() for part in samples()),
    "float64": lambda _: (samples()[0].double().numpy(), samples()[1].numpy().astype(np.int16)),
    "lists": lambda _: (samples()[0].tolist(), samples()[1].tolist()),
    "labels that are floats": lambda _: (samples()[0], samples()[1].float()),
    "labels that are words": lambda _: (samples()[0], ["no" if label == 0 else "yes" for label in samples()[1]]),
    "a tensor with gradients": lambda _: (samples()[0].requires_grad_(), samples()[1]),
    "a reversed view": lambda _: (samples()[0].flip(0).numpy()[::-1], samples()[1]),
    "a TensorDataset": lambda _: TensorDataset(*samples()),
    "a data set": lambda _: Pairs(),
    "a data set of mappings": lambda _: Mappings(),
    "a loader": lambda _: DataLoader(TensorDataset(*samples()), batch_size=5),
    "a loader of mappings": lambda _: DataLoader(Mappings(), batch_size=5),
    "a loader without batches": lambda _: DataLoader(Pairs(), batch_size=None),
    "a list of pairs": lambda _: [Pairs()[index] for index in range(NUM)],
    "an iterator of pairs": lambda _: (Pairs()[index] for index in range(NUM)),
    "a mapping": lambda _: {"features": samples()[0], "labels": samples()[1]},
    "a table of pandas": lambda _: _frame(),
    "a table of Arrow": lambda _: pa.Table.from_pandas(_frame()),
    "a table of the hub": lambda _: HubLike(),
    "an npz file": _npz,
    "a Parquet file of numbers": _parquet,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_in_any_form_are_the_same(kind: str, tmp_path: Path) -> None:
    x, y = samples()
    found = read_data(KINDS[kind](tmp_path))
    torch.testing.assert_close(found.x, x, rtol=1e-6, atol=0)
    assert torch.equal(found.labels, y)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fill_takes_a_loader_as_it_takes_tensors() -> None:
    trained = TrainedGenerator(igpg())
    filled = trained.fill(network(), instruction=ASK, data=samples()).state_dict()
    loaded = trained.fill(network(), instruction=ASK, data=DataLoader(Pairs(), batch_size=5)).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in filled.items())


def _pictures(folder: Path) -> np.ndarray:
    """Two classes of two grey images, 8x8; their pixels uint8 `(4, 8, 8)`."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    for index, image in enumerate(pixels):
        place = folder / ("cat" if index < 2 else "dog") / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    return pixels


def _image_table(folder: Path, pixels: np.ndarray) -> Path:
    contents = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        contents.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": contents, "label": [0, 0, 1, 1]}), folder / "images.parquet")
    return folder / "images.parquet"


def test_images_in_any_form_become_the_generators_samples(tmp_path: Path) -> None:
    pixels = _pictures(tmp_path / "pictures")
    wanted = ((torch.from_numpy(pixels).float() / 255 - 0.25) / 0.5).unsqueeze(1)
    labels = torch.tensor([0, 0, 1, 1])
    forms: dict[str, Any] = {
        "a folder": tmp_path / "pictures",
        "a table": _image_table(tmp_path, pixels),
        "planes": (pixels[:, None], labels),
        "no channel": (pixels, labels),
        "channels last": (pixels[..., None], labels),
        "a data set of pictures": list(zip(map(Image.fromarray, pixels), labels, strict=True)),
    }
    for name, data in forms.items():
        found = read_data(data, FORM)
        torch.testing.assert_close(found.x, wanted, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(found.labels, labels), name
    assert read_data(tmp_path / "pictures", FORM).class_names == ("cat", "dog")
    # Without a known form they stay as they are.
    assert read_data((pixels, labels)).x.max() > 1


def test_samples_without_labels_are_taken_where_none_are_needed(tmp_path: Path) -> None:
    x, _ = samples()
    np.save(tmp_path / "mine.npy", x.numpy())
    for data in (x, x.numpy(), tmp_path / "mine.npy"):
        found = read_data(data, needs_labels=False)
        assert torch.equal(found.x, x)
        assert found.y_S is None
        with pytest.raises(ConditionError, match="no labels; give"):
            read_data(data)


def _refused() -> dict[str, tuple[Any, str]]:
    x, y = samples()
    ragged = [(torch.zeros(index + 1), 0) for index in range(3)]
    return {
        "nothing that holds samples": (3, "data is a int; give"),
        "a triple": ((x, y, y), "a tuple of 3; give a pair"),
        "labels one by one hot": ((x, torch.nn.functional.one_hot(y)), r"labels \[12, 2\]; give"),
        "halves of classes": ((x, y + 0.5), "are no classes"),
        "complex samples": ((x.to(torch.complex64), y), "complex64; give real numbers"),
        "text": ((["a", "b"], [0, 1]), "give numbers"),
        "ragged samples": (ragged, "samples differ in shape"),
        "an empty loader": (DataLoader(TensorDataset(x[:0], y[:0])), "empty; give at least one"),
        "an endless stream": (Endless(), "says no length"),
        "splits of the hub": ({"train": HubLike(), "test": HubLike()}, r"give one of them, such as data\['train'\]"),
        "a mapping of other names": ({"a": 1, "b": 2}, "name the inputs x and the labels y"),
        "a table without labels": (_frame().drop(columns="label"), "name the inputs x and the labels y"),
        "broken code": (Broken(), "sample 0 cannot be read .*my own mistake"),
    }


@pytest.mark.parametrize("kind", _refused())
def test_what_is_not_taken_is_refused_in_one_line(kind: str) -> None:
    data, message = _refused()[kind]
    with pytest.raises(ConditionError, match=message) as refused:
        read_data(data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["mine.pt", "mine.pkl", "mine.csv", "none.npz", "none.parquet", "none"])
def test_files_that_are_not_taken_are_named(name: str, tmp_path: Path) -> None:
    if name.startswith("mine"):
        (tmp_path / name).write_bytes(b"1,2,3\n")
    with pytest.raises(ValueError, match=name) as refused:
        read_data(str(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_many_samples_are_thinned_by_class() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    kept = read_data((torch.arange(100.0)[:, None], labels)).at_most(20)
    assert torch.bincount(kept.labels).tolist() == [10, 10]
    assert torch.equal(labels[kept.x[:, 0].long()], kept.labels)


def test_columns_of_a_table_may_be_numbers() -> None:
    x, y = samples()
    read = read_data(pd.DataFrame(x.numpy()).assign(label=y.numpy()))
    torch.testing.assert_close(torch.as_tensor(read.x).double(), x.double())
