"""A path that data names stays in the folder of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.corpus import Corpus, build_corpus
from raywgen.corpus.build import BuildConfig
from raywgen.corpus.errors import CorpusError, DamagedFileError
from raywgen.corpus.export import export
from raywgen.corpus.manifest import MANIFEST
from raywgen.inputs import UnusableFileError, check_stays, inside
from raywgen.sealed import sealed_json, unseal
from raywgen.weights import save_state_dict
from raywgen.weights.cache import FOLDER, cache_folder

OUTSIDE = [
    "/etc/passwd",
    "../secret.arrow",
    "weights/../../secret.arrow",
    "..",
    "weights/./one.arrow",
    "",
    "weights\\one.arrow",
    "weights/one\0.arrow",
    "s3://bucket/one.arrow",
    "file:///etc/passwd",
    7,
    None,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_elsewhere_are_refused(name: Any) -> None:
    with pytest.raises(UnusableFileError, match="is no name of a file below its folder"):
        inside(name)


def test_names_below_the_folder_are_taken(tmp_path: Path) -> None:
    for name in ("weights/one.arrow", "..hidden/a..b", "é ü/[1].arrow"):
        assert inside(name) == name
        check_stays(tmp_path, name)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for index in range(2):
        state = {"weight": torch.full((3, 4), float(index)), "bias": torch.zeros(4)}
        save_state_dict(state, tmp_path / "nets" / f"{index}.safetensors", {})
    out = tmp_path / "corpus"
    build_corpus(BuildConfig(sources=[str(tmp_path / "nets")], out=str(out), distributed=False))
    return out


def forge(corpus: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest as its author could, checksum and all."""
    manifest = unseal((corpus / MANIFEST).read_text())
    change(manifest)
    (corpus / MANIFEST).write_text(sealed_json(manifest))


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["shard", "facts"])
def test_a_manifest_cannot_name_files_outside(corpus: Path, name: Any, kind: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        if kind == "shard":
            manifest["shards"][0]["path"] = name
        else:
            manifest["files"]["tasks.parquet"] = name

    forge(corpus, change)
    with pytest.raises(DamagedFileError, match="is no name of a file below its folder"):
        Corpus.open(corpus)


@pytest.mark.parametrize("link", ["weights", "weights/SHARD", "checkpoints.parquet"])
def test_links_out_of_a_corpus_are_refused(corpus: Path, tmp_path: Path, link: str) -> None:
    (shard,) = (path.name for path in (corpus / "weights").iterdir())
    path = corpus / link.replace("SHARD", shard)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedFileError, match="is a link out of its folder"):
        Corpus.open(corpus)


def test_a_link_to_a_corpus_and_links_within_it_are_taken(corpus: Path, tmp_path: Path) -> None:
    (corpus / "weights").rename(corpus / "here")
    (corpus / "weights").symlink_to("here")
    (tmp_path / "link").symlink_to(corpus)
    assert Corpus.open(tmp_path / "link").facts.num_rows == 2


def test_a_checksum_is_no_path(corpus: Path) -> None:
    forge(corpus, lambda manifest: manifest["shards"][0].update(sha256="../../.bashrc"))
    with pytest.raises(DamagedFileError, match="is no checksum"):
        Corpus.open(corpus)


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "a\0b", "a/../../../out"])
def test_an_id_leads_no_export_out_of_its_folder(corpus: Path, tmp_path: Path, name: str) -> None:
    import pyarrow as pa

    opened = Corpus.open(corpus)
    column = opened.facts.column_names.index("checkpoint_id")
    ids = pa.array([name, "other"])
    opened.__dict__["facts"] = opened.facts.set_column(column, "checkpoint_id", ids).append_column(
        "stored_id", opened.facts.column("checkpoint_id")
    )
    with pytest.raises(CorpusError, match="would be written outside of"):
        export(opened, tmp_path / "exported" / "here")
    assert not list((tmp_path).rglob("out.safetensors"))


def test_a_cache_that_another_made_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder()
    (tmp_path / "mine").mkdir()
    folder.symlink_to(tmp_path / "mine")
    with pytest.raises(PermissionError, match=f"name another by {FOLDER}"):
        cache_folder()
