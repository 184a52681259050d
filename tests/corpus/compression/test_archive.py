"""Compressed corpora: what a real zoo keeps of its accuracy at what size, and damage that is named."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.corpus import Corpus, CorpusError, DamagedFileError, MissingFileError, verify_corpus
from raywgen.corpus.compression import BudgetError, CodecConfig, NetworkCodec, compress, decompress
from raywgen.corpus.compression.bitstream import BitstreamError, from_bytes, to_bytes
from raywgen.tasks import balanced_accuracy, build_network, build_task, stacked_logits
from raywgen.weights import Layout, StateDict
from raywgen.zoo import ZooConfig
from tests.conftest import make_zoo
from tests.corpus.builders import network

CODEC = CodecConfig(bits_per_value=4.25, min_values=128, small_bits=8, state_bits=8)
ZOO = ZooConfig(
    networks=[[64, 64, 2]],
    num_seen_tasks=4,
    num_validation_tasks=1,
    num_unseen_tasks=1,
    seeds_per_task=2,
    num_steps=60,
    checkpoint_steps=[30, 60],
    num_condition_samples=16,
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_zoo(ZOO, tmp_path_factory.mktemp("zoo") / "corpus")


@pytest.fixture(scope="module")
def compressed(zoo: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compressed") / "folder"
    compress(str(root), zoo, CODEC)
    return root


def accuracies(corpus: Corpus) -> list[float]:
    """Accuracy of the trained networks on their tasks' test samples."""
    (facts,) = corpus.networks.values()
    module, found = build_network(facts.recipe).eval(), []
    for row, state in corpus.checkpoints(["step=60"]):
        task = build_task(corpus.tasks[row["task_id"]].recipe)
        logits_1SC = stacked_logits(module, {name: x.unsqueeze(0) for name, x in state.items()}, task.test_x_SF)
        found.append(float(balanced_accuracy(logits_1SC, task.test_y_S)))
    return found


def test_a_zoo_keeps_its_accuracy_at_an_eighth_of_its_size(zoo: Corpus, compressed: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in (compressed / "codes").iterdir()]
    num_values = sum(zoo.facts.column("num_values").to_pylist())
    # Beside 4.25 bits a value: parts of whole bytes, checkpoint ids and Parquet's own footer.
    assert sum(sizes) < 4.25 * num_values / 8 + 2000 * len(sizes)
    again = decompress(str(tmp_path / "again"), str(compressed))
    assert verify_corpus(again.location) == []
    before, after = accuracies(zoo), accuracies(again)
    assert mean(before) > 0.9
    assert mean(after) > mean(before) - 0.01
    errors, powers = [], []
    for (_, old), (_, new) in zip(zoo.checkpoints(), again.checkpoints(), strict=True):
        assert list(old) == list(new)
        errors.append(sum(float((new[name] - old[name]).square().sum()) for name in old))
        powers.append(sum(float(old[name].square().sum()) for name in old))
    # Measured 17.0 dB; of the 25.6 that 4.25 bits can buy, scales and padding of small networks take some.
    assert sum(errors) / sum(powers) < 10**-1.6


def test_facts_tasks_and_networks_come_back(zoo: Corpus, compressed: Path, tmp_path: Path) -> None:
    again = decompress(str(tmp_path / "again"), str(compressed))
    changed = {"shard", "row", "sha256", "xxh3"}
    kept = [name for name in zoo.facts.column_names if name not in changed]
    assert set(kept) <= set(again.facts.column_names)

    def rows(corpus: Corpus) -> list[dict[str, Any]]:
        return sorted(corpus.facts.select(kept).to_pylist(), key=lambda row: row["checkpoint_id"])

    assert repr(rows(again)) == repr(rows(zoo))  # NaN is no equal of itself.
    assert again.tasks.keys() == zoo.tasks.keys()
    assert [each.to_json() for each in again.networks.values()] == [each.to_json() for each in zoo.networks.values()]


def test_what_no_generator_writes_comes_back_bit_for_bit() -> None:
    from raywgen.corpus.compression.archive import _coded, _decoded

    state: StateDict = {
        **network(3, 0),
        "mask": torch.tensor([True, False, True]),
        "steps": torch.tensor(7),
        "half": torch.randn(40, 20, generator=torch.Generator().manual_seed(0)).half(),
    }
    layout, codec = Layout.from_state_dict(state), NetworkCodec(CodecConfig(bits_per_value=9.0, min_values=64))
    row = {"checkpoint_id": "a", **_coded("a", layout, layout.pack(state), codec)}
    again = layout.unpack(_decoded(row, layout, codec, "file"))
    assert torch.equal(again["mask"], state["mask"])
    assert torch.equal(again["steps"], state["steps"])
    assert again["half"].dtype == torch.float16
    with pytest.raises(DamagedFileError, match="lacks values of"):
        _decoded(row | {"kept": row["kept"][:-1]}, layout, codec, "file")


@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_bytes_are_the_code_and_nothing_else(bits: float) -> None:
    codec = NetworkCodec(CodecConfig(bits_per_value=bits, min_values=64, small_bits=7, state_bits=6, vector_length=64))
    state = {"a.weight": torch.randn(60, 40, generator=torch.Generator().manual_seed(1)), "a.bias": torch.randn(60)}
    coded = codec.encode(state)
    content = to_bytes(coded, codec)
    # Each of at most 13 parts is padded to whole bytes.
    assert 0 <= 8 * len(content) - sum(codec.bits(coded).values()) < 8 * 13
    again = from_bytes(content, coded.layout, codec)
    assert again.threshold == coded.threshold
    for name in ("codes_NL", "rows_G", "columns_I", "small_Y", "ends_T2"):
        assert torch.equal(getattr(again, name), getattr(coded, name)), name
    for damaged, word in ((content[:-1], "it ends"), (content + b"\0", "are left")):
        with pytest.raises(BitstreamError, match=word):
            from_bytes(damaged, coded.layout, codec)


def test_the_commands_compress_and_decompress(zoo: Corpus, tmp_path: Path) -> None:
    options = ["--bits", "4", "--min-values", "128", "--small-bits", "8", "--state-bits", "4"]
    done = CliRunner().invoke(app, ["corpus", "compress", zoo.location, str(tmp_path / "small"), *options])
    assert done.exit_code == 0, done.output
    assert f"{zoo.facts.num_rows} checkpoints" in done.output
    done = CliRunner().invoke(app, ["corpus", "decompress", str(tmp_path / "small"), str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    assert Corpus.open(tmp_path / "again").facts.num_rows == zoo.facts.num_rows


def test_mistakes_are_named(zoo: Corpus, compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="already holds a compressed corpus"):
        compress(str(compressed), zoo, CODEC)
    with pytest.raises(CorpusError, match="already holds a corpus"):
        compress(zoo.location, zoo, CODEC)
    with pytest.raises(BudgetError, match=r"bits_per_value=0\.5.*min_values"):
        compress(str(tmp_path / "tight"), zoo, CodecConfig(bits_per_value=0.5))
    with pytest.raises(MissingFileError, match="it is no compressed corpus"):
        decompress(str(tmp_path / "none"), zoo.location)
    with pytest.raises(MissingFileError, match="no corpus"):
        Corpus.open(compressed)


def test_changed_files_are_refused_before_a_corpus_is_written(compressed: Path, tmp_path: Path) -> None:
    codes = next((compressed / "codes").iterdir())
    whole = codes.read_bytes()
    codes.write_bytes(whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:])
    try:
        with pytest.raises(DamagedFileError, match=r"codes/.*another checksum"):
            decompress(str(tmp_path / "again"), str(compressed))
    finally:
        codes.write_bytes(whole)
    with pytest.raises(MissingFileError):
        Corpus.open(tmp_path / "again")
    manifest = compressed / "compressed.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"small_bits": 8', '"small_bits": 9'))
    try:
        with pytest.raises(DamagedFileError, match="its checksum differs"):
            decompress(str(tmp_path / "again"), str(compressed))
    finally:
        manifest.write_text(text)
    assert json.loads(text)["codec"]["small_bits"] == 8
    assert pq.read_table(codes).column_names == ["checkpoint_id", "code", "kept"]
