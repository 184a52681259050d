"""What data says is text: nothing in it is resolved, and no address in it is contacted without the user's word."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raywgen
from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.evaluation.request import read_samples
from raywgen.evaluation.tokenizer_report import report_run
from raywgen.generators.bundle import BundleError, load_bundle
from raywgen.generators.igpg import IGPGConfig
from raywgen.sealed import sealed_json, unseal
from raywgen.stored_config import stored_config
from raywgen.tasks import build_task
from raywgen.tasks.preprocessing import input_form
from raywgen.training import TrainConfig, launch
from raywgen.training.run_folder import CONFIG
from raywgen.training.status import run_status
from raywgen.trust import UntrustedError, trusting
from raywgen.zoo import ZooConfig, train_zoo
from raywgen.zoo.replay import replay
from tests.conftest import TINY_ZOO
from tests.security.hostile import change_json, hostile_corpus, listening
from tests.security.test_imports import data_encoder, inputs_encoder

SECRET = "s3cr3t-value"
ADDRESSES = [
    "http://127.0.0.1:{port}/x",
    "hdfs://127.0.0.1:{port}/x",
    "s3://bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http",
    "s3://key:word@bucket/x?endpoint_override=http://127.0.0.1:{port}",
    "file://127.0.0.1:{port}/x",
]
pytestmark = pytest.mark.filterwarnings("ignore:.*has no checksums")


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", SECRET)


def text_encoder(bundle: Path, name: str) -> None:
    change_json(bundle / "generator.json", lambda content: content["config"]["prior"].update(text_encoder=name))


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("change", [data_encoder, inputs_encoder], ids=lambda change: change.__name__)
def test_a_bundle_contacts_nobody(bundle: Path, address: str, change: Callable[[Path, str], None]) -> None:
    with listening() as (port, was_called):
        change(bundle, address.format(port=port) + "/${oc.env:SECRET}")
        with pytest.raises(UntrustedError, match=r"\$\{oc.env:SECRET\}.*--trust") as refused:
            raywgen.load(bundle)
        assert not was_called()
    assert SECRET not in str(refused.value)
    assert str(bundle) in str(refused.value)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("key", ["path", "test_path", "encoder"])
def test_a_task_of_a_corpus_contacts_nobody(zoo_corpus: Corpus, tmp_path: Path, address: str, key: str) -> None:
    with listening() as (port, was_called):
        named = address.format(port=port)
        task: dict[str, Any] = {"name": "images", "path": "none.parquet", "test_path": ""}
        task = task | {key: named} if key != "encoder" else {"name": "encoded", "encoder": named, "task": task}
        corpus = hostile_corpus(zoo_corpus, tmp_path / "corpus", task=task)
        recipe = next(iter(corpus.tasks.values())).recipe
        with pytest.raises(UntrustedError, match="would be fetched from there") as refused:
            launch([TrainConfig(corpus=corpus.location, out=str(tmp_path / "out"), num_workers=0)])
        assert corpus.location in str(refused.value)
        for read in (build_task, input_form):
            with pytest.raises(UntrustedError):
                read(recipe)
        assert not was_called()


def test_a_corpus_whose_encoder_encodes_the_users_samples_is_named(zoo_corpus: Corpus, tmp_path: Path) -> None:
    images = {"name": "images", "path": "x", "size": 8, "channels": 1, "mean": [0.5], "std": [0.5]}
    corpus = hostile_corpus(
        zoo_corpus, tmp_path / "corpus", task={"name": "encoded", "encoder": "hf:x", "task": images}
    )
    np.savez(tmp_path / "mine.npz", x=np.zeros((4, 3), np.float32), y=np.arange(4) % 2)
    with pytest.raises(UntrustedError, match=rf"'hf:x' of {corpus.location} would be fetched.*--trust hf:x"):
        read_samples(corpus, str(tmp_path / "mine.npz"))


@pytest.mark.parametrize("name", ["hf:openai/clip-vit-base-patch32", "hf:{folder}", "hf:x/${oc.env:SECRET}"])
@pytest.mark.parametrize("change", [data_encoder, inputs_encoder, text_encoder], ids=lambda change: change.__name__)
def test_a_bundle_fetches_no_model(
    bundle: Path, tmp_path: Path, name: str, change: Callable[[Path, str], None]
) -> None:
    name = name.format(folder=tmp_path) if "$" not in name else name
    change(bundle, name)
    with pytest.raises(UntrustedError) as refused:
        raywgen.load(bundle)
    assert f"--trust {name}" in str(refused.value)


@pytest.mark.parametrize("path", ["/", "{out}", "../out", "\\\\host\\share", "//host/share"])
@pytest.mark.parametrize("change", [data_encoder, inputs_encoder], ids=lambda change: change.__name__)
def test_a_bundle_opens_no_encoder_outside_of_its_folder(
    bundle: Path, tmp_path: Path, path: str, change: Callable[[Path, str], None]
) -> None:
    change(bundle, path.format(out=tmp_path / "out"))
    with pytest.raises(UntrustedError, match="--trust"):
        raywgen.load(bundle)


def test_a_copied_encoder_does_not_lead_out_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    key = f"prior.data_encoder./{tmp_path}/elsewhere"
    change_json(bundle / "generator.json", lambda content: content.update(encoders=[key]))
    with pytest.raises((UntrustedError, ValueError), match=r"damaged|outside"):
        load_bundle(bundle)
    change_json(
        bundle / "generator.json", lambda content: content["config"]["prior"].update(data_encoder=str(tmp_path))
    )
    change_json(bundle / "generator.json", lambda content: content.update(encoders=[]))
    with pytest.raises(UntrustedError, match="outside"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", ["/dev/zero", "../../../../../../../../dev/zero"])
def test_a_bundle_has_no_file_outside_of_it_read(bundle: Path, name: str) -> None:
    content = unseal((bundle / "generator.json").read_bytes()) | {"files": {name: "0"}}
    (bundle / "generator.json").write_text(sealed_json(content))
    with pytest.raises(BundleError, match="lies outside of the folder"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("trusted", "address"),
    [
        ("s3://bucket", "s3://bucket-of-another/x"),
        ("s3://bucket", "s3://bucket@127.0.0.1/x"),
        ("s3://bucket/mine", "s3://bucket/mine/../theirs"),
        ("s3://bucket", "s3://bucket/x?endpoint_override=127.0.0.1"),
        ("hf:me", "hf:me-too/x"),
        ("hf:me/model", "hf:me/other"),
        ("/data", "/database"),
    ],
)
def test_trust_in_an_address_ends_where_it_ends(bundle: Path, trusted: str, address: str) -> None:
    data_encoder(bundle, address)
    with pytest.raises(UntrustedError, match="--trust"):
        raywgen.load(bundle, trust=(trusted,))


def test_a_trusted_address_is_contacted(bundle: Path) -> None:
    data_encoder(bundle, "http://127.0.0.1:1/x")
    with pytest.raises(ValueError, match="there is no encoder in 'http://127"):
        raywgen.load(bundle, trust=("http://127.0.0.1:1",))


TEXTS = ["${oc.env:SECRET}", "${oc.decode:1}", "${.seed}", "${", "???", "a=b", "{x: 1}", "[1, 2]", "1e3", "null", "~"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_a_stored_config_stay_texts(text: str) -> None:
    stored = dataclasses.asdict(ZooConfig()) | {"out": text, "networks": [{"name": text}]}
    config = stored_config(ZooConfig, stored, "here")
    assert config.out == text
    assert config.networks == [{"name": text}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": "${oc.env:SECRET}"}, "num_steps holds a str"),
        ({"num_steps": True}, "num_steps holds a bool"),
        ({"tasks": "x"}, "'tasks' in here holds a group of keys"),
        ({"checkpoint_steps": [1, "2"]}, "checkpoint_steps holds a str"),
        ({"num_step": 1}, "unknown key 'num_step'"),
        ({"tasks": {"kind": "${oc.env:SECRET}"}}, "tasks: kind="),
        ({"num_steps": -1}, "num_steps=-1"),
    ],
)
def test_a_stored_config_is_checked_and_tells_no_secret(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        stored_config(ZooConfig, dataclasses.asdict(ZooConfig()) | change, "here")
    assert SECRET not in str(refused.value)


def test_a_stored_config_is_what_was_stored() -> None:
    for config in (ZooConfig(), TINY_ZOO, IGPGConfig()):
        assert stored_config(type(config), dataclasses.asdict(config), "here") == config


def test_the_folder_of_a_run_resolves_nothing(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("method: igpg\nout: ${oc.env:SECRET}\ncorpus: x\n")
    assert SECRET not in str(run_status(tmp_path))
    for line in ("method: ${oc.env:SECRET}", "seed: ${oc.env:SECRET}", "generator: {prior: {width: ${oc.env:SECRET}}}"):
        (tmp_path / CONFIG).write_text(f"{line}\n")
        for read in (run_status, lambda path: launch([TrainConfig(out=str(path), num_workers=0)])):
            with pytest.raises(ConfigError) as refused:
                read(tmp_path)
            assert SECRET not in str(refused.value)


def test_the_folder_of_a_run_names_no_corpus_to_contact(bundle: Path) -> None:
    with listening() as (port, was_called):
        (bundle.parent / CONFIG).write_text(f"method: igpg\ncorpus: hdfs://127.0.0.1:{port}/corpus\n")
        with pytest.raises(UntrustedError, match="corpus 'hdfs://127"):
            report_run(bundle.parent)
        assert not was_called()


def test_a_zoo_is_replayed_without_resolving(zoo_corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(zoo_corpus.location, tmp_path / "corpus")
    change_json(
        tmp_path / "corpus" / "manifest.json",
        lambda content: content["recipe"]["zoo"]["tasks"].update(kind="${oc.env:SECRET}"),
    )
    corpus = Corpus.open(tmp_path / "corpus")
    with pytest.raises(ConfigError, match=r"kind=\$\{oc\.env:SECRET\}") as refused:
        replay(corpus, corpus.facts.column("trajectory_id")[0].as_py())
    assert SECRET not in str(refused.value)


def test_addresses_of_the_users_own_config_are_contacted(tmp_path: Path) -> None:
    with listening() as (port, _):
        address = f"http://127.0.0.1:{port}/x"
        zoo = ZooConfig(networks=["tiny-cnn"])
        zoo.tasks.kind, zoo.tasks.path = "images", address
        with pytest.raises(ValueError, match="cannot be reached"):
            train_zoo(zoo, str(tmp_path / "zoo"), distributed=False)
        with trusting(f"http://127.0.0.1:{port}"), pytest.raises(ValueError, match="cannot be reached"):
            build_task({"name": "images", "path": address})
