"""Layouts of large networks and networks cut from them; the whole path at a size that says nothing of speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raywgen.benchmarks.run import run
from raywgen.benchmarks.scale import ScaleConfig
from raywgen.benchmarks.scale_networks import Model, cut, empty_module, write_seeded
from raywgen.benchmarks.scale_processes import slope, steady_rate
from raywgen.generation import load
from raywgen.weights import Layout, load_state_dict

QUICK = [
    "generator.tokenizer={num_steps: 2, batch_size: 4, width: 16, quantiser: {num_levels: 2, num_codes: 16}}",
    "generator.prior={num_steps: 2, batch_size: 2, width: 16, num_layers: 1, num_heads: 2, window: 32}",
    "piece_values=20000",
]


@pytest.mark.parametrize(
    ("model", "num_parameters", "name"),
    [
        ("resnet101", 44_549_160, "layer3.22.bn3.running_var"),
        ("vit_large", 304_326_632, "blocks.23.attn.qkv.weight"),
        ("billion", 1_000_014_128, "6.bias"),
    ],
)
def test_a_model_has_the_size_and_the_names_of_the_real_one(model: Model, num_parameters: int, name: str) -> None:
    module = empty_module(model)
    assert sum(parameter.numel() for parameter in module.parameters()) == num_parameters
    assert name in module.state_dict()


@pytest.mark.parametrize("num_values", [4096, 500_000, 5_000_000])
def test_a_cut_network_has_the_first_tensors_and_about_the_wanted_size(num_values: int) -> None:
    whole = empty_module("resnet101").state_dict()
    state = cut(whole, num_values)
    assert list(state) == list(whole)[: len(state)]
    assert all(state[name].shape[1:] == whole[name].shape[1:] for name in state)
    assert Layout.from_state_dict(state).num_values == pytest.approx(num_values, rel=0.001)


def test_a_file_of_seeded_values_holds_the_network(tmp_path: Path) -> None:
    state = cut(empty_module("resnet101").state_dict(), 200_000)
    layout = write_seeded(state, tmp_path / "one.safetensors")
    write_seeded(state, tmp_path / "two.safetensors")
    stored = load_state_dict(tmp_path / "one.safetensors")
    assert Layout.from_state_dict(stored).id == layout.id
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert stored["bn1.running_var"].min() > 0
    assert stored["bn1.num_batches_tracked"] == 0
    weight = stored["layer1.0.conv2.weight"]
    assert weight.std() == pytest.approx((64 * 9) ** -0.5, rel=0.05)
    assert not torch.equal(weight, stored["layer1.1.conv2.weight"])


def test_slope_and_rate_by_hand() -> None:
    assert slope([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]) == pytest.approx(1)
    assert slope([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)
    # Two actors begin after 10 seconds and then take 2 for 5 values each.
    reports = [(0.0, 0), (12.0, 5), (12.0, 10), (14.0, 15), (14.0, 20), (16.0, 25), (16.0, 30)]
    assert steady_rate(reports, 2) == pytest.approx(5)
    with pytest.raises(ValueError, match="2 pieces are too few"):
        steady_rate(reports[:3], 2)


def test_settings_that_measure_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least four"):
        ScaleConfig(sizes=[1000, 2000, 3000])
    with pytest.raises(ValueError, match=r"small has 164,234 values; give fewer"):
        run(["scale", "sizes=[1000,2000,3000,200000]", f"folder={tmp_path}"])
    with pytest.raises(ValueError, match="no token is drawn"):
        ScaleConfig(temperature=0.0)


def snr_of_whole_network(folder: Path) -> float:
    """Signal to noise of the network that `reconstruct` makes of all values at once."""
    generator = load(str(folder / "prior"), device="cpu").generator
    state = load_state_dict(folder / "networks/small/model.safetensors")
    layout, normalizer = generator.normalizers[Layout.from_state_dict(state).id]
    values_1D = layout.flatten(state).unsqueeze(0)
    signal_1D, kept_1D = (normalizer.normalise(each) for each in (values_1D, generator.reconstruct(values_1D, layout)))
    return float(10 * (signal_1D.square().sum() / (kept_1D - signal_1D).square().sum()).log10())


@pytest.mark.slow
def test_a_network_goes_the_whole_path(tmp_path: Path) -> None:
    result = run(["scale", *QUICK, f"folder={tmp_path}"])
    figures, values = result["figures"], result["conditions"]["values"]
    stages = {f"seconds_{stage}" for stage in ("corpus", "tokenizer", "tokens", "prior", "generate", "load")}
    others = {"values_per_second", "peak_gib", "slope", "actors_2_over_1", "bits_per_value", "snr_db"}
    assert figures.keys() == stages | others
    # Two levels of 16 codes for each of 16 values.
    assert figures["bits_per_value"] == pytest.approx(2 * 4 / 16, rel=0.01)
    assert figures["snr_db"] == pytest.approx(snr_of_whole_network(tmp_path), abs=0.001)
    assert figures["slope"] > 0
    assert figures["actors_2_over_1"] > 0
    assert len(values) == 6
    file = load_state_dict(next((tmp_path / "generated/small").glob("*.safetensors")))
    assert Layout.from_state_dict(file).num_values == values["small"]
