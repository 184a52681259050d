from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.corpus import Corpus
from raywgen.evaluation.report import ReportError, write_report
from tests.cli.test_use import output_of
from tests.generation.test_generate import bundle

__all__ = ["bundle"]


def test_many_networks_into_a_corpus(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    settings = [f"generator={bundle}", f"corpus={zoo_corpus.location}", f"out={tmp_path / 'out'}", "best_of=2"]
    shown = output_of("generate", *settings, "--num", "3", "limit=1", "--into", "corpus")
    assert "networks" in shown
    assert "±" in shown
    assert Corpus.open(tmp_path / "out").facts.num_rows == 3 * 2
    assert f"page: {tmp_path / 'out'}/report.html" in shown
    text = (tmp_path / "out" / "report.html").read_text()
    assert "6 networks score" in text
    assert '<a href="manifest.json">' in text
    with pytest.raises(ReportError, match="is a corpus that nobody generated; `raywgen corpus info` shows"):
        write_report(zoo_corpus.location)


def test_one_network_each_names_its_file(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    settings = [f"generator={bundle}", f"corpus={zoo_corpus.location}", f"out={tmp_path / 'out'}", "best_of=2"]
    shown = output_of("generate", *settings, "limit=1", "network=mlp-64-6-2")
    assert "kept as" in shown
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert f'<a href="{file.name}">' in (tmp_path / "out" / "report.html").read_text()
