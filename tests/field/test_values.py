"""Complex values are weights, packed integers are no counters, and every dtype comes back bit for bit."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.derive import dedupe
from raywgen.corpus.export import export
from raywgen.corpus.packed_weights import refuse_packed_weights
from raywgen.weights import Layout, StateDict, WeightsError, load_state_dict, save_state_dict
from tests.corpus.builders import assert_same_bits
from tests.field.builders import build, reasons, save

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "U16": torch.uint16,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


def fourier(seed: int) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "spectral": torch.randn(2, 3, dtype=torch.complex64, generator=generator),
        "fc.weight": torch.randn(3, 2, generator=generator),
    }


def quantised(seed: int) -> StateDict:
    """A layer as GPTQ packs it, with counters and tables beside it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.qweight": torch.randint(-(2**31), 2**31 - 1, (4, 8), dtype=torch.int32, generator=generator),
        "layer.scales": torch.full((8,), 0.25).half(),
        "bn.num_batches_tracked": torch.tensor(seed),
        "position_ids": torch.arange(32),
    }


def folder(tmp_path: Path, states: dict[str, StateDict]) -> Corpus:
    for name, state in states.items():
        save(tmp_path / "in" / f"{name}.pt", state)
    return build(tmp_path, tmp_path / "in")


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_comes_back_from_both_formats(tmp_path: Path, kind: str) -> None:
    raw = torch.tensor([[127, 126, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5, 6]], dtype=torch.uint8)
    state = {"w": raw.view(DTYPES[kind]), "b": torch.ones(3).bfloat16()}
    if kind.startswith("F8") and kind != "F8_E8M0":
        state["w"] = (raw % 64).view(DTYPES[kind])  # none of them is NaN
    save(tmp_path / "in" / "torch.pt", state)
    save(tmp_path / "in" / "st.safetensors", state)
    corpus = build(tmp_path, tmp_path / "in")
    assert len(corpus.networks) == 1
    assert not reasons(corpus)
    export(corpus, tmp_path / "out")
    for name in ("torch", "st"):
        for stored in (corpus.state_dict(name), load_state_dict(tmp_path / "out" / f"{name}.safetensors")):
            assert_same_bits(dict(sorted(stored.items())), dict(sorted(state.items())))


def test_two_values_in_a_byte_by_hand(tmp_path: Path) -> None:
    """The file counts values, torch counts bytes."""
    header = json.dumps({"w": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "f4.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(8)))
    (stored,) = load_state_dict(tmp_path / "f4.safetensors").values()
    assert (stored.dtype, stored.shape) == (torch.float4_e2m1fn_x2, (4, 2))
    assert stored.view(torch.uint8).flatten().tolist() == list(range(8))


def test_complex_values_are_pairs_of_weights(tmp_path: Path) -> None:
    bad = fourier(2)
    torch.view_as_real(bad["spectral"])[0, 0, 1] = float("nan")
    corpus = folder(tmp_path, {"good": fourier(0), "nan": bad})
    assert list(reasons(corpus)) == ["nan"]
    (layout,) = (network.layout for network in corpus.networks.values())
    assert layout.num_values == 2 * 6 + 6
    values_D = corpus.values(corpus.facts)[0]
    assert torch.equal(values_D[:12], torch.view_as_real(fourier(0)["spectral"]).flatten())
    assert_same_bits(layout.unflatten(values_D), fourier(0))
    assert_same_bits(corpus.state_dict("good"), fourier(0))
    mean, _ = corpus.moments(layout.id)["spectral"]
    assert mean == pytest.approx(float(values_D[:12].mean()), abs=1e-6)
    stream = corpus.stream(chunk_length=5, batch_size=2, prefetch=0)
    seen = {int(c): v.clone() for batch in stream.epoch() for c, v in zip(batch.chunk_B, batch.values_BK, strict=True)}
    assert torch.equal(torch.cat([seen[chunk] for chunk in range(4)])[:18], values_D)


def test_conjugated_and_odd_places_in_memory(tmp_path: Path) -> None:
    state = {"a": torch.randn(3), "w": torch.randn(2, dtype=torch.complex64).conj()}
    layout = Layout.from_state_dict(state)
    values_ND = torch.stack([layout.flatten(state), layout.flatten(state)]).requires_grad_()
    stacked = layout.unflatten(values_ND)
    assert torch.equal(stacked["w"][1], state["w"].resolve_conj())
    stacked["w"].abs().sum().backward()
    assert bool(values_ND.grad[:, 3:].any())  # pyright: ignore[reportOptionalSubscript]
    packed_P, values_D = layout.pack(state), layout.flatten(state)
    for start in range(6):
        assert torch.equal(
            layout.slice_values(lambda ranges: [packed_P[a:b] for a, b in ranges], start, 2),
            values_D[start : start + 2],
        )


DOUBLE = {"w": torch.full((2, 3), 1 + 2j, dtype=torch.complex128), "v": torch.ones(2)}


@pytest.mark.parametrize(
    ("others", "fact"),
    [
        ({"plain": {"w": torch.ones(2, 3), "v": torch.ones(2)}}, "dtype"),
        ({"single": DOUBLE | {"w": DOUBLE["w"].to(torch.complex64)}}, "shard"),
        ({"other": {"u": torch.ones(4), "half": torch.ones(4).half()}}, "layout_id"),
    ],
)
def test_what_safetensors_cannot_hold_is_named_with_a_query_that_exports_the_rest(
    tmp_path: Path, others: dict[str, StateDict], fact: str
) -> None:
    corpus = folder(tmp_path, {"a-double": DOUBLE} | others)
    assert_same_bits(corpus.state_dict("a-double"), DOUBLE)
    command = ["corpus", "export", corpus.location, str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    message = str(refused.exception)
    assert "tensor 'w' of checkpoint 'a-double' is complex128" in message
    terms = re.findall(r"'(\w+!=[^']+)'", message)
    assert [term.partition("!=")[0] for term in terms] == [fact]
    assert CliRunner().invoke(app, [*command, *terms]).exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix] == [f"{next(iter(others))}.safetensors"]
    with pytest.raises(WeightsError, match=r"no complex128 \(tensor 'w'\)"):
        save_state_dict(DOUBLE, tmp_path / "double.safetensors", {})


def test_where_nothing_else_is_selected_no_query_is_offered(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"complex128.*no other checkpoint is selected"):
        export(folder(tmp_path, {"a": DOUBLE}), tmp_path / "out")


def test_packed_integers_are_refused_before_training_and_counters_are_not(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"'layer\.qweight' \(int32\[4, 8\]\).*packed weights"):
        refuse_packed_weights(folder(tmp_path / "packed", {"a": quantised(0), "b": quantised(1)}))
    same = {f"{seed}": quantised(seed) | {"layer.qweight": torch.ones(4, 8).int()} for seed in range(2)}
    refuse_packed_weights(folder(tmp_path / "counters", same))
    packed = {"w": torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "b": torch.ones(2)}
    with pytest.raises(CorpusError, match=r"'w'.*packed weights"):
        refuse_packed_weights(folder(tmp_path / "f4", {"a": packed}))


def test_networks_that_differ_in_packed_or_complex_values_alone_are_not_near(tmp_path: Path) -> None:
    twin = quantised(0) | {"bn.num_batches_tracked": torch.tensor(9)}
    states = {"a": quantised(0), "b": quantised(1), "c": twin}
    kept = dedupe(str(tmp_path / "near"), folder(tmp_path / "packed", states), near=1e-3)
    assert kept.facts.column("checkpoint_id").to_pylist() == ["a", "b"]
    other = fourier(0)
    other["spectral"] = other["spectral"] * 1j
    near = fourier(0)
    near["spectral"] = near["spectral"] * (1 + 1e-6j)
    corpus = folder(tmp_path / "complex", {"a": fourier(0), "b": other, "c": near})
    kept = dedupe(str(tmp_path / "apart"), corpus, near=1e-3)
    assert kept.facts.column("checkpoint_id").to_pylist() == ["a", "b"]
