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
from raywgen.tasks.ink import paper


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
