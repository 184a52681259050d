"""Bundles: what is loaded generates what was saved, bit for bit; damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.generators import GenerationRequest, Generator
from raywgen.generators.bundle import (
    BundleError,
    BundleFormatError,
    build_generator,
    bundle_facts,
    load_bundle,
    save_bundle,
)
from raywgen.sealed import file_checksum, sealed_json, unseal
from raywgen.weights import load_state_dict, save_state_dict
from tests.builders import (
    DATA,
    DEEP,
    SMALL,
    condition,
    hypernetwork,
    igpg,
    igpg_config,
    layout_of,
    noise_for,
    normalizers,
    units,
)

CONFIG, WEIGHTS = "generator.json", "generator.safetensors"


@pytest.mark.parametrize("build", [igpg, hypernetwork, units])
def test_round_trip_generates_bit_equal_networks(tmp_path: Path, build: Callable[[], Generator]) -> None:
    generator = build()
    save_bundle(generator, tmp_path, {"seed": 3, "corpus": "zoo"})
    loaded = load_bundle(tmp_path)
    assert type(loaded) is type(generator)
    assert loaded.config == generator.config
    assert loaded.data == generator.data
    assert not loaded.training
    for widths in (SMALL, DEEP):
        before, after = (
            g.generate(GenerationRequest(condition=condition(3), layout=layout_of(widths), noise=noise_for(3)))
            for g in (generator, loaded)
        )
        assert torch.equal(before.values_BD, after.values_BD)
    assert bundle_facts(tmp_path) == {"seed": 3, "corpus": "zoo"}
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors", ".md"}


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    generator = igpg()
    save_bundle(generator, tmp_path, {"seed": 3})
    card = (tmp_path / "README.md").read_text()
    assert f"{sum(p.numel() for p in generator.parameters()):,} parameters" in card
    assert all(layout_id in card for layout_id in generator.normalizers)
    assert "- seed: 3" in card


def test_equal_arguments_build_equal_generators_and_leave_global_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (build_generator("igpg", igpg_config(), normalizers(), DATA, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert any(not torch.equal(tensor, other.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_a_missing_bundle_names_the_folder_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="raywgen train") as caught:
        load_bundle(tmp_path / "nothing")
    assert "nothing" in str(caught.value)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def reseal(folder: Path, **changes: Any) -> None:
    """As somebody writes a bundle whose parts do not fit each other, with checksums that do."""
    content = unseal((folder / CONFIG).read_text()) | changes
    content["files"] = {name: file_checksum(folder / name) for name in content["files"]}
    (folder / CONFIG).write_text(sealed_json(content))


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def break_json(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-50])


def drop_tensor(folder: Path) -> None:
    tensors = load_state_dict(folder / WEIGHTS)
    del tensors["model.prior.head.bias"]
    save_state_dict(tensors, folder / WEIGHTS, {})
    reseal(folder)


def drop_normalizer(folder: Path) -> None:
    tensors = load_state_dict(folder / WEIGHTS)
    del tensors[next(name for name in tensors if name.startswith("normalizer."))]
    save_state_dict(tensors, folder / WEIGHTS, {})
    reseal(folder)


def edit(key: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        reseal(folder, **{key: value})

    return damage


def edit_by_hand(folder: Path) -> None:
    content = json.loads((folder / CONFIG).read_text())
    content["config"]["prior"]["num_heads"] *= 2
    (folder / CONFIG).write_text(json.dumps(content))


def no_object(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, f"{WEIGHTS} is damaged"),
        (edit_by_hand, "changed since it was written"),
        (remove_weights, "does not exist"),
        (break_json, "damaged"),
        (drop_tensor, "prior.head.bias"),
        (drop_normalizer, "normalizer."),
        (edit("method", "igpq"), "igpg"),
        (edit("config", {"priors": {"width": 8}}), "prior"),
        (edit("config", {"prior": {"width": 32}}), "size mismatch"),
        (edit("data", {"num_features": 6}), "max_classes"),
        (edit("layouts", []), "damaged"),
        (no_object, "damaged"),
    ],
)
def test_damage_is_named_with_the_remedy(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    save_bundle(igpg(), tmp_path, {})
    damage(tmp_path)
    with pytest.raises(BundleError, match="train it again") as caught:
        load_bundle(tmp_path)
    assert reason in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_weights_of_another_bundle_are_refused(tmp_path: Path) -> None:
    first, second = build_generator("igpg", igpg_config(), normalizers(), DATA, 1), igpg()
    save_bundle(first, tmp_path / "first", {})
    save_bundle(second, tmp_path / "second", {})
    (tmp_path / "first" / WEIGHTS).replace(tmp_path / "second" / WEIGHTS)
    with pytest.raises(BundleError, match=rf"second/{WEIGHTS} is damaged, or belongs to another generator"):
        load_bundle(tmp_path / "second")


def test_a_bundle_of_an_older_version_is_read_with_a_warning(tmp_path: Path) -> None:
    save_bundle(igpg(), tmp_path, {"seed": 3})
    content = unseal((tmp_path / CONFIG).read_text())
    del content["files"]
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"has no checksums, because an older raywgen wrote it.*train it again"):
        load_bundle(tmp_path)
    assert bundle_facts(tmp_path) == {"seed": 3}


def test_a_bundle_of_another_format_names_the_version_that_reads_it(tmp_path: Path) -> None:
    save_bundle(hypernetwork(), tmp_path, {})
    content = unseal((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(sealed_json(content | {"schema_version": 1}))
    with pytest.raises(BundleFormatError, match=r"format 1, this raywgen reads format 3; raywgen 0\.1 reads format 1"):
        load_bundle(tmp_path)
