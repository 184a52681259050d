from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raywgen.corpus import Corpus, CorpusError, UnknownFactError
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.export import export
from raywgen.locks import LOCK
from raywgen.weights import StateDict
from tests.corpus.builders import assert_same_bits


def networks() -> dict[str, StateDict]:
    torch.manual_seed(0)
    return {
        "mixed/a": {
            "w.weight": torch.randn(4, 3),
            "h": torch.randn(5).half(),
            "b": torch.randn(2, 3).bfloat16(),
            "d": torch.randn(3, dtype=torch.float64),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "mask": torch.tensor([True, False, True]),
            "steps": torch.tensor(2**40),
            "none": torch.empty(0, 3),
            "zero": torch.tensor([0.0, -0.0]),
        },
        "wrapped/b": {"module.fc.weight": torch.randn(3, 3), "module.fc.bias": torch.randn(3)},
        "wrapped/c": {"_orig_mod.module.fc.weight": torch.randn(3, 3), "_orig_mod.module.fc.bias": torch.randn(3)},
        "large": {"w": torch.randn(300, 500), "b": torch.randn(70_001)},
    }


def build(root: Path, states: dict[str, StateDict], save: Callable[[StateDict, Path], None], suffix: str) -> Corpus:
    for name, state in states.items():
        path = root / "nets" / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(state, path)
    return build_corpus(BuildConfig(out=str(root / "corpus"), sources=[str(root / "nets")], distributed=False))


def same(left: StateDict, right: StateDict) -> None:
    assert_same_bits(dict(sorted(left.items())), dict(sorted(right.items())))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_exported_files_are_the_ingested_ones_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    states = networks()
    corpus = build(tmp_path, states, save_file if suffix == ".safetensors" else torch.save, suffix)
    progress: list[tuple[int, int]] = []
    written = export(corpus, tmp_path / "out", on_progress=lambda done, total: progress.append((done, total)))
    assert sorted(written) == sorted(tmp_path / f"out/{name}.safetensors" for name in states)
    again = build_corpus(BuildConfig(out=str(tmp_path / "again"), sources=[str(tmp_path / "out")], distributed=False))
    assert again.manifest["recipe"]["others"] == {}, "the lock is no file that is passed over"
    files = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {*written, tmp_path / "out" / LOCK}
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for name, state in states.items():
        same(load_file(tmp_path / f"out/{name}.safetensors"), state)


def test_an_exported_file_tells_its_facts(tmp_path: Path) -> None:
    corpus = build(tmp_path, networks(), save_file, ".safetensors")
    (path,) = export(corpus, tmp_path / "out", ["checkpoint_id=large"])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    found = tuple(metadata[f"raywgen.{name}"] for name in ("checkpoint_id", "dtype", "num_values"))
    assert found == ("large", "float32", "220001")
    assert metadata["raywgen.sha256"] == corpus.select(checkpoint_id="large").column("sha256")[0].as_py()


def test_a_query_chooses_what_is_written(tmp_path: Path) -> None:
    corpus = build(tmp_path, networks(), save_file, ".safetensors")
    written = export(corpus, tmp_path / "out", ["checkpoint_id~wrapped/*", "key_prefix=module."])
    assert written == [tmp_path / "out/wrapped/b.safetensors"]
    with pytest.raises(UnknownFactError, match="did you mean 'key_prefix'"):
        export(corpus, tmp_path / "out", ["key_prefixes=module."])


def test_nothing_selected_is_refused(tmp_path: Path) -> None:
    corpus = build(tmp_path, networks(), save_file, ".safetensors")
    with pytest.raises(
        CorpusError, match=r"corpus holds no checkpoint with dtype=int8 step=3; see `raywgen corpus info`"
    ):
        export(corpus, tmp_path / "out", ["dtype=int8", "step=3"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("checkpoint_id", ["../escaped", "a/../../escaped", "ABSOLUTE"])
def test_an_id_that_leads_out_of_the_folder_is_refused(tmp_path: Path, checkpoint_id: str) -> None:
    from tests.corpus import builders

    name = str(tmp_path / "escaped") if checkpoint_id == "ABSOLUTE" else checkpoint_id
    shard = builders.shard(tmp_path / "c", "s", {name: builders.network(2, 0)})
    corpus = builders.commit(tmp_path / "c", [shard], [builders.Layout.from_state_dict(builders.network(2, 0))])
    with pytest.raises(CorpusError, match=r"escaped' would be written outside of .*out; rename it"):
        export(corpus, tmp_path / "out")
    assert not list(tmp_path.rglob("escaped*"))
