"""Brings drawings to the same polarity: dark ink on white paper, or light ink on black paper.

An encoder trained on one polarity has never met the other, and a comparison of methods on its features would then
measure that difference more than the methods.

Shape letters beyond the legend in `raywgen.weights`: C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from raywgen.files import in_one_step
from raywgen.tasks.images import ImageData, load_images

_MARGIN = 8  # Levels of 255: resizing and JPEG leave paper a little off its extreme.
_LEAST_SHARE = 0.25


def paper(x_SCHW: Tensor) -> str | None:
    """Returns the colour of the paper, `black` or `white`, or None for images without one, such as photographs.

    Paper is the colour of at least a quarter of all pixels, and of at least twice as many as the opposite one.

    Args:
        x_SCHW: Pixels, uint8.
    """
    black = float((x_SCHW <= _MARGIN).float().mean())
    white = float((x_SCHW >= 255 - _MARGIN).float().mean())
    if max(black, white) < _LEAST_SHARE or max(black, white) < 2 * min(black, white):
        return None
    return "black" if black > white else "white"


def with_ink_of(reference: ImageData, path: str, folder: str | Path) -> str:
    """Returns the path of images with the same paper as another data set, inverted where necessary.

    Args:
        reference: Data whose paper the images should have.
        path: Images that `load_images` takes.
        folder: Folder in which inverted images are kept, as a Parquet file of the same name.

    Returns:
        `path` itself where the papers agree or one of the two has none, else the file of inverted images.
    """
    data = load_images(path)
    papers = {paper(reference.x_SCHW), paper(data.x_SCHW)}
    if papers != {"black", "white"}:
        return path
    digest = hashlib.sha256(data.x_SCHW.contiguous().numpy().data).hexdigest()[:12]
    inverted = Path(folder) / f"inverted-{digest}" / f"{Path(path).stem}.parquet"
    if not inverted.is_file():
        inverted.parent.mkdir(parents=True, exist_ok=True)
        with in_one_step(inverted) as partial:
            pq.write_table(_table(data), partial)
    return str(inverted)


def _table(data: ImageData) -> pa.Table:
    """Returns a table of inverted images, as PNG, with their labels and the names of their classes."""
    rows = [{"bytes": _png(255 - x_CHW), "path": f"{row}.png"} for row, x_CHW in enumerate(data.x_SCHW)]
    features = {"label": {"names": list(data.class_names), "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(data.y_S.tolist(), pa.int64()),
        }
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _png(x_CHW: Tensor) -> bytes:
    pixels = x_CHW[0] if len(x_CHW) == 1 else x_CHW.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).contiguous().numpy()).save(file, format="PNG")
    return file.getvalue()
