"""Damage at random: a reader raises `WeightsError` or returns whole weights, and runs nothing."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raywgen.weights import WeightsError
from raywgen.weights.packed import PackedCheckpoint
from raywgen.weights.reader import WeightsReader
from tests.weights.test_reader import Calls, touch

MUTANTS_PER_SEED = 40
SEEDS = range(10)
KINDS = (
    "safetensors",
    "resealed safetensors",
    "zip",
    "strided zip",
    "resealed zip",
    "legacy",
    "hostile zip",
    "hostile legacy",
)


def write_whole(kind: str, folder: Path, marker: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {
        "layer.weight": torch.randn(4, 3, generator=generator),
        "layer.bias": torch.randn(3, generator=generator),
        "half": torch.randn(5, generator=generator).half(),
        "step": torch.tensor(7),
    }
    if "safetensors" in kind:
        save_file(state, folder / "model.safetensors", {"note": "x"})
        return folder / "model.safetensors"
    content: dict[str, object] = {"epoch": 3, "model": state}
    if kind == "strided zip":
        content["model"] = {name: tensor.t() if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    if kind.startswith("hostile"):
        content["trap"] = Calls(touch, str(marker))
    torch.save(content, folder / "model.pt", _use_new_zipfile_serialization="legacy" not in kind)
    return folder / "model.pt"


def flip(raw: bytes, rng: np.random.Generator) -> bytes:
    content = bytearray(raw)
    for place in rng.integers(0, len(content), int(rng.integers(1, 4))):
        content[place] ^= int(rng.integers(1, 256))
    return bytes(content)


def truncate(raw: bytes, rng: np.random.Generator) -> bytes:
    return raw[: rng.integers(0, len(raw))]


def duplicate(raw: bytes, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(0, len(raw) + 1, 2).tolist())
    return raw[:last] + raw[first:last] + raw[last:]


def remove(raw: bytes, rng: np.random.Generator) -> bytes:
    first = int(rng.integers(0, len(raw)))
    return raw[:first] + raw[first + int(rng.integers(1, 40)) :]


def overwrite_number(raw: bytes, rng: np.random.Generator) -> bytes:
    """A binary number of the kinds that headers hold, often an extreme one."""
    width = int(rng.choice([1, 2, 4, 8]))
    extremes = (0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), (1 << (8 * width - 1)) - 1, len(raw))
    number = int(extremes[rng.integers(len(extremes))]) % (1 << 8 * width)
    place = int(rng.integers(0, max(len(raw) - width, 1)))
    return raw[:place] + number.to_bytes(width, "little") + raw[place + width :]


def rewrite_digits(raw: bytes, rng: np.random.Generator) -> bytes:
    """A number in text, as in a safetensors header, becomes another; its length may change."""
    numbers = list(re.finditer(rb"\d+", raw))
    if not numbers:
        return flip(raw, rng)
    found = numbers[rng.integers(len(numbers))]
    choices = (b"0", b"1", b"-1", b"9", b"1e3", b"2.0", b"4294967296", b"9223372036854775808", b"99999999999999999999")
    digits = choices[rng.integers(len(choices))]
    if rng.random() < 0.5:
        digits = digits[: len(found[0])].ljust(len(found[0]), b" ")
    return raw[: found.start()] + digits + raw[found.end() :]


def move(raw: bytes, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(0, len(raw) + 1, 2).tolist())
    rest = raw[:first] + raw[last:]
    place = int(rng.integers(0, len(rest) + 1))
    return rest[:place] + raw[first:last] + rest[place:]


MUTATIONS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    flip,
    flip,
    truncate,
    duplicate,
    remove,
    overwrite_number,
    overwrite_number,
    rewrite_digits,
    rewrite_digits,
    move,
)


def mutate(raw: bytes, rng: np.random.Generator) -> bytes:
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        raw = MUTATIONS[rng.integers(len(MUTATIONS))](raw, rng) or b"\0"
    return raw


def write_mutant(kind: str, path: Path, raw: bytes, rng: np.random.Generator) -> None:
    """Damages the file; where resealed, its description alone, and makes the length or checksum fit again."""
    if not kind.startswith("resealed"):
        path.write_bytes(mutate(raw, rng))
        return
    if kind == "resealed safetensors":
        first_value = 8 + int.from_bytes(raw[:8], "little")
        header = mutate(raw[8:first_value], rng)
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[first_value:])
        return
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, mutate(content, rng) if name.endswith("data.pkl") else content)


def assert_self_consistent(checkpoint: PackedCheckpoint) -> None:
    layout = checkpoint.layout
    assert checkpoint.packed_P.dtype == np.uint8
    assert len(checkpoint.packed_P) == layout.num_bytes
    assert len(layout.id) == 16
    assert len({spec.name for spec in layout.tensors}) == len(layout.tensors) > 0
    state = layout.unpack(torch.from_numpy(checkpoint.packed_P))
    assert [tuple(tensor.shape) for tensor in state.values()] == [spec.shape for spec in layout.tensors]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_whole_weights_or_a_weights_error(tmp_path: Path, kind: str, seed: int) -> None:
    marker = tmp_path / "executed"
    path = write_whole(kind, tmp_path, marker)
    raw = path.read_bytes()
    whole = None if kind.startswith("hostile") else WeightsReader().read(path)
    reader = WeightsReader()
    for index in range(MUTANTS_PER_SEED):
        rng = np.random.default_rng([KINDS.index(kind), seed, index])
        write_mutant(kind, path, raw, rng)
        where = f"{kind}, seed {seed}, mutant {index}"
        try:
            checkpoint = reader.read(path)
        except WeightsError as error:
            assert path.name in str(error), where  # noqa: PT017
        except Exception as error:
            raise AssertionError(where) from error
        else:
            assert_self_consistent(checkpoint)
            if whole is not None and kind in ("zip", "strided zip") and checkpoint.layout == whole.layout:
                assert checkpoint.packed_P.tobytes() == whole.packed_P.tobytes(), where
        assert not marker.exists(), where
