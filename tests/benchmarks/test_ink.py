"""Data sets of drawings get ink of one brightness."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raywgen.benchmarks.ink import with_ink_of
from raywgen.tasks.images import load_digits_images, load_images


def _stored(path: Path, x_SCHW: torch.Tensor, labels: list[int]) -> str:
    images = []
    for x_CHW in x_SCHW:
        file = io.BytesIO()
        Image.fromarray(x_CHW[0].numpy()).save(file, format="PNG")
        images.append(file.getvalue())
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return str(path)


@pytest.mark.parametrize("reference_is_white", [True, False])
def test_images_are_inverted_where_the_papers_differ_and_stay_otherwise(
    tmp_path: Path, reference_is_white: bool
) -> None:
    digits = load_digits_images()
    # The digits' paper is black: a reference on black paper leaves them as they are.
    x_SCHW, labels = digits.x_SCHW[:20], digits.y_S[:20].tolist()
    path = _stored(tmp_path / "few.parquet", x_SCHW, labels)
    reference = load_images(
        _stored(tmp_path / "reference.parquet", 255 - x_SCHW if reference_is_white else x_SCHW, labels)
    )
    used = with_ink_of(reference, path, tmp_path / "kept")
    if not reference_is_white:
        assert used == path
        return
    inverted = load_images(used)
    assert torch.equal(inverted.x_SCHW, 255 - x_SCHW)
    assert inverted.y_S.tolist() == labels
    assert inverted.class_names == load_images(path).class_names
    assert Path(used).stem == "few"
    assert with_ink_of(reference, path, tmp_path / "kept") == used


def test_photographs_stay_as_they_are(tmp_path: Path) -> None:
    photographs = torch.randint(256, (6, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = _stored(tmp_path / "photographs.parquet", photographs, [0, 1] * 3)
    assert with_ink_of(load_digits_images(), path, tmp_path / "kept") == path
