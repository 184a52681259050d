from __future__ import annotations

from pathlib import Path

from raywgen.corpus import Corpus
from tests.cli.test_use import output_of
from tests.generation.test_generate import bundle

__all__ = ["bundle"]


def test_many_networks_into_a_corpus(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    settings = [f"generator={bundle}", f"corpus={zoo_corpus.location}", f"out={tmp_path / 'out'}", "best_of=2"]
    shown = output_of("generate", *settings, "--num", "3", "limit=1", "--into", "corpus")
    assert "networks" in shown
    assert "±" in shown
    assert Corpus.open(tmp_path / "out").facts.num_rows == 3 * 2


def test_one_network_each_names_its_file(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    settings = [f"generator={bundle}", f"corpus={zoo_corpus.location}", f"out={tmp_path / 'out'}", "best_of=2"]
    shown = output_of("generate", *settings, "limit=1", "network=mlp-64-6-2")
    assert "kept as" in shown
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
