"""What came as data takes no more memory than belongs to it, however large it says that it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import raywgen
from raywgen.corpus import Corpus, DamagedFileError
from raywgen.generators.bundle import BundleError
from raywgen.tasks import TaskError, build_network
from raywgen.tasks.encoders import EncoderCard, load_encoder, save_encoder
from raywgen.trust import StoredRecipe
from raywgen.weights import Layout
from tests.security.hostile import change_json, hostile_corpus

ABSURD: dict[str, dict[str, Any]] = {
    "wide": {"name": "mlp", "widths": [10**9, 10**9, 2]},
    "many outputs": {"name": "vit-ti", "num_classes": 10**9},
}


@pytest.mark.parametrize("kind", ABSURD)
def test_a_corpus_builds_no_network_beyond_what_it_stores(zoo_corpus: Corpus, tmp_path: Path, kind: str) -> None:
    corpus = hostile_corpus(zoo_corpus, tmp_path / "corpus", network=ABSURD[kind])
    recipe = next(net.recipe for net in corpus.networks.values() if net.recipe == ABSURD[kind])
    with pytest.raises(TaskError, match=r"of .*corpus is not built: it would hold more"):
        build_network(recipe)


def test_a_stored_network_may_be_as_large_as_what_is_stored() -> None:
    recipe = {"name": "mlp", "widths": [1 << 15, 1 << 16]}
    with torch.device("meta"):
        build_network(StoredRecipe.of(recipe, "corpus", num_stored=1 << 31))
        build_network(recipe)
        with pytest.raises(TaskError, match="'mlp-32768-65536' of corpus is not built"):
            build_network(StoredRecipe.of(recipe, "corpus", num_stored=1 << 20))


def test_a_network_is_not_built_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raywgen.nn.bounds._MOST_CALLS", 100)
    with pytest.raises(TaskError, match="it is built in more than 100 steps"):
        build_network(StoredRecipe.of({"name": "mlp", "widths": [2] * 100}, "corpus"))


def _at(group: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    return _at(group[path[0]], path[1:]) if path else group


@pytest.mark.parametrize("path", [("prior", "width"), ("tokenizer", "quantiser", "num_codes")])
def test_a_bundle_builds_no_generator_beyond_what_it_stores(bundle: Path, path: tuple[str, ...]) -> None:
    change_json(
        bundle / "generator.json", lambda content: _at(content["config"], path[:-1]).update({path[-1]: 1 << 40})
    )
    with pytest.raises(BundleError, match="it would hold more than 1,073,741,824 values"):
        raywgen.load(bundle)


def test_an_encoder_is_not_larger_than_its_file(tmp_path: Path) -> None:
    card = EncoderCard(network=ABSURD["wide"], size=8, channels=1, mean=(0.5,), std=(0.5,))
    save_encoder({"weight": torch.zeros(1)}, card, str(tmp_path))
    with pytest.raises(TaskError, match="is not built: it would hold more"):
        load_encoder(str(tmp_path))


def test_a_manifest_promises_no_more_than_its_shards_hold(zoo_corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(zoo_corpus.location, tmp_path / "corpus")

    def change(manifest: dict[str, Any]) -> None:
        network = manifest["networks"][0]
        before = Layout.from_json(network["layout"])
        first, *rest = before.tensors
        after = Layout((dataclasses.replace(first, shape=(10**9, 10**9)), *rest))
        network.update(layout=after.to_json(), form_id=after.form_id)
        text = json.dumps(manifest["shards"]).replace(before.id, after.id).replace(before.form_id, after.form_id)
        manifest.update(shards=json.loads(text))

    change_json(tmp_path / "corpus" / "manifest.json", change)
    with pytest.raises(DamagedFileError, match="is shorter than one of its checkpoints"):
        Corpus.open(tmp_path / "corpus")
