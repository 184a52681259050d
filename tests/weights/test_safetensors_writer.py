"""Equal networks are equal bytes, and the library reads what is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from raywgen.weights import save_state_dict
from raywgen.weights.safetensors_writer import safetensors_bytes, write_safetensors

METADATA = {
    "task": "digits/1",
    "é": 'quotes " and \\ and / ',
    "control": "\x00\x01\x08\x0b\x1f\x7f\u0085\u2028\U0001f600",
    **{f"key{i}": str(i) for i in range(12)},
}
WRITE = """
import sys, torch
from raywgen.weights import save_state_dict
metadata = {f"key{i}": str(i) for i in range(12)}
if len(sys.argv) > 2:
    metadata = dict(reversed(metadata.items()))
save_state_dict({"b": torch.ones(3), "a": torch.ones(2).half(), "n": torch.tensor(4)}, sys.argv[1], metadata)
"""


def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "half": torch.ones(7, dtype=torch.bfloat16),
        "fp8": torch.ones(3).to(torch.float8_e4m3fn),
        "count": torch.tensor(3),
        "none": torch.empty(0, 4),
        'odd " name\n': torch.ones(1, dtype=torch.bool),
    }


@pytest.mark.parametrize("metadata", [METADATA, {}], ids=["metadata", "none"])
def test_the_library_reads_the_file_and_its_metadata(tmp_path: Path, metadata: dict[str, str]) -> None:
    write_safetensors(tensors(), tmp_path / "net.safetensors", metadata)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} | metadata
        for name, tensor in tensors().items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    content = (tmp_path / "net.safetensors").read_bytes()
    assert content == safetensors_bytes(tensors(), metadata)
    assert set(load(content)) == set(tensors())


def test_processes_write_equal_bytes(tmp_path: Path) -> None:
    """The library's own order of twelve keys is one in 479 million."""
    for index, more in enumerate([[], [], ["reversed"]]):
        command = [sys.executable, "-c", WRITE, str(tmp_path / str(index)), *more]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": str(index)})
    first, *others = [(tmp_path / str(index)).read_bytes() for index in range(3)]
    assert all(other == first for other in others)


def test_the_metadata_is_sorted(tmp_path: Path) -> None:
    save_state_dict({"w": torch.ones(1)}, tmp_path / "a", {"z": "1", "b": "2", "a": "3"})
    assert b'{"__metadata__":{"a":"3","b":"2","format":"pt","z":"1"},"w":' in (tmp_path / "a").read_bytes()
