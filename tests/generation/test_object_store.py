"""Generators that are read from an object store or the hub, and networks that are written to one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import raywgen
from raywgen.config import save_config
from raywgen.corpus import Corpus
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.evaluate import evaluate
from raywgen.generation import GenerateConfig, generate
from raywgen.generators.bundle import BundleError, bundle_digest, check_bundle, load_bundle, save_bundle
from raywgen.out_folder import OutError
from raywgen.storage import Storage
from tests.generation.test_generate import bundle, config

__all__ = ["bundle"]
pytestmark = pytest.mark.usefixtures("one_thread")

_KILLED = """
import os, signal, sys
from raywgen.config import load_config
from raywgen.generation import GenerateConfig, generate

def stop(done, total):
    if done >= 4:
        os.kill(os.getpid(), signal.SIGKILL)

generate(load_config(GenerateConfig, sys.argv[1]), stop)
"""


def upload(bundle: str, folder: str) -> str:
    Storage.at(folder).upload(bundle, "")
    return folder


def test_a_bundle_is_written_to_a_store_and_read_back(bundle: str, bucket: str, tmp_path: Path) -> None:
    generator, folder = load_bundle(bundle), f"{bucket}/run/generator"
    save_bundle(generator, folder, {"seed": 3})
    for path in (folder, f"{bucket}/run"):
        loaded = raywgen.load(path).generator
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in generator.state_dict().items())
    save_bundle(generator, tmp_path / "local", {"seed": 3})
    assert bundle_digest(folder) == bundle_digest(tmp_path / "local")
    check_bundle(folder)


def test_what_is_damaged_or_missing_in_a_store_is_named(bundle: str, bucket: str) -> None:
    folder = upload(bundle, f"{bucket}/run")
    with pytest.raises(BundleError, match=f"^{bucket}/nothing holds no trained generator"):
        raywgen.load(f"{bucket}/nothing")
    with pytest.raises(BundleError, match=r"^s3://missing/run"):
        raywgen.load("s3://missing/run")
    Storage.at(folder).write("generator.safetensors", b"other")
    with pytest.raises(BundleError, match=rf"^{folder}/generator\.safetensors is damaged"):
        raywgen.load(folder)
    upload(bundle, folder)
    raywgen.load(folder)  # The damaged copy is replaced.
    Storage.at(folder).delete("generator.safetensors")
    with pytest.raises(BundleError, match=r"generator\.safetensors is missing"):
        raywgen.load(folder)


def test_a_bundle_is_read_from_the_hub(bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds what the hub's client has fetched; no network is there."""
    repository, commit = tmp_path / "models--owner--name", "0123456789012345678901234567890123456789"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(bundle, repository / "snapshots" / commit)
    shutil.copytree(bundle, repository / "snapshots" / commit / "deep" / "generator")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = load_bundle(bundle).state_dict()
    for name in ("hf://owner/name", "hf://owner/name@main/deep"):
        loaded = raywgen.load(name).generator.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    with pytest.raises(BundleError, match=r"^hf://owner/other cannot be fetched \([^\n]+$"):
        raywgen.load("hf://owner/other")
    with pytest.raises(BundleError, match="names no repository; write hf://owner/name"):
        raywgen.load("hf://name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BundleError, match=r"needs huggingface_hub; install it by `pip install 'raywgen\[hub\]'`"):
        raywgen.load("hf://owner/name")


@pytest.mark.parametrize("into", ["files", pytest.param("corpus", marks=pytest.mark.slow)])
def test_networks_go_to_a_store_also_after_a_kill(
    into: str, zoo_corpus: Corpus, bundle: str, bucket: str, tmp_path: Path
) -> None:
    here = config(zoo_corpus, bundle, tmp_path / "here", into=into, batch_size=4, limit=2, num=2)
    there = config(zoo_corpus, upload(bundle, f"{bucket}/run"), Path(), into=into, batch_size=4, limit=2, num=2)
    there.out = f"{bucket}/networks"
    save_config(there, tmp_path / "config.yaml")
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "config.yaml")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert Storage.at(there.out).list("units")
    progress: list[int] = []
    rows = generate(there, lambda done, total: progress.append(done))
    assert progress[0] >= 2, "what was written before the kill is not written again"
    expected = generate(here)
    assert [row.log_prob for row in rows] == [row.log_prob for row in expected]
    if into == "files":
        storage = Storage.at(there.out)
        assert storage.walk() == sorted(path.name for path in Path(here.out).iterdir() if path.name[0] != ".")
        assert [row["path"] for row in json.loads(storage.read("networks.json"))] == [row.path for row in rows]
        for row, local in zip(rows, expected, strict=True):
            storage.download(Path(row.path).name, tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == Path(local.path).read_bytes()
    else:
        one, other = Corpus.open(there.out), Corpus.open(here.out)
        assert one.facts.column("sha256").equals(other.facts.column("sha256"))


def test_networks_for_a_store_that_is_not_there_are_not_generated(
    zoo_corpus: Corpus, bundle: str, bucket: str, tmp_path: Path
) -> None:
    settings = config(zoo_corpus, bundle, tmp_path)
    settings.out = "s3://missing/networks"
    with pytest.raises(OutError, match="there is no such bucket"):
        generate(settings)
    settings.out = ""
    with pytest.raises(OutError, match="out is empty"):
        generate(GenerateConfig(**{**vars(settings)}))


def test_an_evaluation_and_its_report_lie_in_a_store(
    zoo_corpus: Corpus, bundle: str, bucket: str, tmp_path: Path
) -> None:
    from raywgen.evaluation.report import ReportError, write_report

    run = f"{bucket}/run"
    upload(bundle, f"{run}/generator")
    with pytest.raises(ReportError, match=f"{run} holds nothing to report"):
        write_report(run)
    settings = EvaluateConfig(
        generator=run, corpus=zoo_corpus.location, out=f"{run}/evaluation", best_of=1, num_tasks=1, finetune_epochs=[1]
    )
    result = evaluate(settings)
    assert json.loads(Storage.at(run).read("evaluation/evaluation.json"))["figures"] == result.figures
    assert write_report(run) == f"{run}/report.html"
    assert b"On seen tasks, generated networks reach" in Storage.at(run).read("report.html")
