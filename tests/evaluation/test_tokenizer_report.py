"""The tokeniser's figures against independent computations on a real zoo.

Shape legend: N networks, D values, X chunks, L levels.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.evaluation.tables import print_tokenizer
from raywgen.evaluation.tokenizer_facts import SplitReport, TokenizerReport
from raywgen.evaluation.tokenizer_report import code_counts, code_use, report_run, tokenizer_report
from raywgen.generators.bundle import load_bundle
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.generators.igpg import IGPG, IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.generators.settings import StageConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.tasks import build_network, build_task
from raywgen.training import TrainConfig, launch

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_LEVELS, NUM_CODES, LENGTH = 3, 16, 16
IGPG_CONFIG = IGPGConfig(
    tokenizer=TokenizerConfig(
        num_steps=10,
        batch_size=8,
        quantiser=QuantiserConfig(num_levels=NUM_LEVELS, num_codes=NUM_CODES),
        chunk_length=LENGTH,
        width=16,
    ),
    prior=PriorConfig(num_steps=1, batch_size=8, width=16, num_layers=1, num_heads=2),
    task_loss=IGPGTaskLossConfig(num_steps=0),
)


@pytest.fixture(scope="module")
def run(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "igpg"
    launch([TrainConfig(generator=IGPG_CONFIG, corpus=zoo_corpus.location, out=str(out), num_workers=0)])
    return out


@pytest.fixture(scope="module")
def generator(run: Path) -> IGPG:
    loaded = load_bundle(run / "generator")
    assert isinstance(loaded, IGPG)
    return loaded


@pytest.fixture(scope="module")
def report(generator: IGPG, zoo_corpus: Corpus) -> TokenizerReport:
    """Of all networks of the zoo."""
    return tokenizer_report(generator, generator.weight_code(), zoo_corpus, num_networks=10_000)


def networks_of(corpus: Corpus, split: SplitReport) -> dict[str, tuple[Tensor, list[str]]]:
    """Layout id -> all values and tasks of a split."""
    names = ["train"] if split.split == "training" else ["heldout", "validation", "unseen"]
    found = {}
    for layout_id in corpus.networks:
        rows = corpus.select(layout_id=layout_id, split=names)
        found[layout_id] = (corpus.values(rows), rows.column("task_id").to_pylist())
    return found


def test_all_networks_but_starts_are_measured_in_one_split_or_the_other(
    report: TokenizerReport, zoo_corpus: Corpus
) -> None:
    splits = Counter(zoo_corpus.facts.column("split").to_pylist())
    assert [split.split for split in report.splits] == ["training", "held out"]
    assert report.splits[0].num_networks == splits["train"]
    assert report.splits[1].num_networks == splits["heldout"] + splits["validation"] + splits["unseen"]


def test_bits_are_those_of_all_tokens(report: TokenizerReport, zoo_corpus: Corpus) -> None:
    for split in report.splits:
        bits = values = 0.0
        for layout_id, (values_ND, _) in networks_of(zoo_corpus, split).items():
            num_chunks = math.ceil(zoo_corpus.layout(layout_id).num_values / LENGTH)
            bits += len(values_ND) * num_chunks * NUM_LEVELS * math.log2(NUM_CODES)
            values += values_ND.numel()
        assert split.bits_per_value == pytest.approx(bits / values)
        assert split.values_per_token == pytest.approx(math.log2(NUM_CODES) * values / bits)


def test_signal_to_noise_by_hand(report: TokenizerReport, generator: IGPG, zoo_corpus: Corpus) -> None:
    for split in report.splits:
        signal = noise = 0.0
        for layout_id, (values_ND, _) in networks_of(zoo_corpus, split).items():
            layout, normalizer = generator.normalizers[layout_id]
            decoded_ND = generator.reconstruct(values_ND, layout)
            signal_ND, kept_ND = (
                (each.double().numpy() - normalizer.base_D.double().numpy()) / normalizer.scale_D.double().numpy()
                for each in (values_ND, decoded_ND)
            )
            signal += np.sum(signal_ND**2)
            noise += np.sum((signal_ND - kept_ND) ** 2)
        # Float32 against float64.
        assert split.snr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
        assert split.snr_gap_db == pytest.approx(20 * math.log10(2) * split.bits_per_value - split.snr_db)


def test_use_of_the_codes_by_hand(report: TokenizerReport, generator: IGPG, zoo_corpus: Corpus) -> None:
    for split in report.splits:
        for level in range(NUM_LEVELS):
            counts: Counter[int] = Counter()
            for layout_id, (values_ND, _) in networks_of(zoo_corpus, split).items():
                codes = generator.tokens(values_ND, zoo_corpus.layout(layout_id))[:, :, level]
                counts.update(codes.flatten().tolist())
            shares = [count / sum(counts.values()) for count in counts.values()]
            entropy = -sum(share * math.log2(share) for share in shares)
            assert split.codes_used[level] == pytest.approx(len(counts) / NUM_CODES)
            assert split.code_perplexity[level] == pytest.approx(2**entropy, rel=1e-6)


def test_accuracy_of_every_network_on_its_own(report: TokenizerReport, generator: IGPG, zoo_corpus: Corpus) -> None:
    split = report.splits[1]
    original, decoded = [], []
    for layout_id, (values_ND, task_ids) in networks_of(zoo_corpus, split).items():
        network = zoo_corpus.networks[layout_id]
        module = build_network(network.recipe)
        kept_ND = generator.reconstruct(values_ND, network.layout)
        for values, found in ((values_ND, original), (kept_ND, decoded)):
            for values_D, task_id in zip(values, task_ids, strict=True):
                task = build_task(zoo_corpus.tasks[task_id].recipe)
                module.load_state_dict(network.layout.unflatten(values_D))
                right = module(task.test_x_SF).argmax(dim=-1) == task.test_y_S
                found.append(np.mean([right[task.test_y_S == label].float().mean() for label in (0, 1)]))
    assert split.original_accuracy == pytest.approx(np.mean(original), abs=1e-5)
    assert split.reconstructed_accuracy == pytest.approx(np.mean(decoded), abs=1e-5)
    assert report.no_accuracy == ""


def test_what_all_networks_share_is_counted_apart(report: TokenizerReport, zoo_corpus: Corpus) -> None:
    assert report.codebook_values == NUM_LEVELS * NUM_CODES * LENGTH
    assert report.decoder_values == 16 * 16 + 16 * (2 * LENGTH + 98 + 3) + LENGTH
    # No tensor of the shared start is one number all over, so that each has as many as values.
    layouts = [network.layout for network in zoo_corpus.networks.values()]
    bases = [zoo_corpus.base_values(layout.id) for layout in layouts]
    assert all(base_D is not None and float(base_D.abs().min()) > 0 for base_D in bases)
    assert report.normalizer_values == sum(layout.num_values + len(layout.tensors) for layout in layouts)


def test_fewer_networks_and_samples_are_taken_evenly(generator: IGPG, zoo_corpus: Corpus) -> None:
    some = tokenizer_report(generator, generator.weight_code(), zoo_corpus, num_networks=6, num_samples=100)
    assert [split.num_networks for split in some.splits] == [6, 6]
    assert all(split.original_accuracy is not None and 0.5 < split.original_accuracy < 1 for split in some.splits)


def test_the_size_of_blocks_changes_no_figure(
    report: TokenizerReport, generator: IGPG, zoo_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raywgen.corpus.at_once._NETWORKS", 7)
    again = tokenizer_report(generator, generator.weight_code(), zoo_corpus, num_networks=10_000)
    for split, other in zip(again.splits, report.splits, strict=True):
        # Sums are added in another order, counts are not.
        close = pytest.approx([other.snr_db, other.snr_gap_db, other.original_accuracy, other.reconstructed_accuracy])
        assert [split.snr_db, split.snr_gap_db, split.original_accuracy, split.reconstructed_accuracy] == close
        assert split.codes_used == other.codes_used
        assert split.code_perplexity == other.code_perplexity
        assert split.bits_per_value == other.bits_per_value


def test_a_corpus_without_recipes_has_no_accuracy_and_says_why(generator: IGPG, zoo_corpus: Corpus) -> None:
    corpus = Corpus.open(zoo_corpus.location)
    for layout_id, network in corpus.networks.items():
        corpus.networks[layout_id] = replace(network, recipe={})
    found = tokenizer_report(generator, generator.weight_code(), corpus, num_networks=6)
    assert "the corpus has no recipe of this network" in found.no_accuracy
    assert all(split.original_accuracy is None and split.reconstructed_accuracy is None for split in found.splits)
    assert all(split.snr_db > 0 for split in found.splits)
    written = io.StringIO()
    print_tokenizer(found, Console(width=200, file=written))
    assert "no accuracy: mlp-64-6-2: the corpus has no recipe" in written.getvalue()


def test_a_run_folder_keeps_its_report(run: Path, generator: IGPG, zoo_corpus: Corpus) -> None:
    first = report_run(run)
    assert first is not None
    assert first == tokenizer_report(generator, generator.weight_code(), zoo_corpus)
    kept = run / "tokenizer.json"
    assert TokenizerReport.from_json(json.loads(kept.read_text())) == first
    kept.write_text(json.dumps(asdict(replace(first, decoder_values=7))))
    again = report_run(run)
    assert again is not None
    assert again.decoder_values == 7


def test_a_generator_without_tokens_has_no_report(zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = HypernetworkConfig(width=16, task_loss=StageConfig(num_steps=1))
    settings = TrainConfig(
        method="hypernetwork", generator=config, corpus=zoo_corpus.location, out=str(tmp_path / "run"), num_workers=0
    )
    launch([settings])
    assert report_run(tmp_path / "run") is None
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_figures_that_are_none_are_refused(report: TokenizerReport) -> None:
    content = asdict(report)
    content["splits"][0]["snr_db"] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        TokenizerReport.from_json(content)
    with pytest.raises(ValueError, match="split 'heldout'"):
        replace(report.splits[0], split="heldout")
    with pytest.raises(ValueError, match="measured on nothing"):
        replace(report, splits=())


def test_use_of_codes_by_hand() -> None:
    codes_NL = torch.tensor([[0, 5], [0, 6], [1, 5], [1, 6]])
    assert code_use(code_counts(codes_NL.unsqueeze(1), 8)) == pytest.approx((0.25, 2.0))
    assert code_use(code_counts(torch.zeros(4, 1, 1, dtype=torch.int64), 8)) == pytest.approx((0.125, 1.0))
