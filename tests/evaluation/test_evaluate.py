from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest

from raywgen.corpus import Corpus
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.evaluate import EvaluationError, evaluate
from raywgen.evaluation.results import Evaluation
from raywgen.evaluation.tokenizer_facts import TokenizerReport
from raywgen.generators.bundle import BundleError
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.training import TrainConfig, launch
from tests.networks_held import NetworksHeld

SMALL_IGPG = IGPGConfig(
    tokenizer=TokenizerConfig(
        num_steps=10, batch_size=8, quantiser=QuantiserConfig(num_levels=3, num_codes=16), width=16
    ),
    prior=PriorConfig(num_steps=5, batch_size=8, width=16, num_layers=1, num_heads=2),
    task_loss=IGPGTaskLossConfig(num_steps=5, batch_size=8),
)


@pytest.fixture(scope="module")
def run(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "igpg"
    launch([TrainConfig(generator=SMALL_IGPG, corpus=zoo_corpus.location, out=str(out), num_workers=0)])
    return out


@pytest.fixture(scope="module")
def result(run: Path, zoo_corpus: Corpus) -> Evaluation:
    config = EvaluateConfig(
        generator=str(run), corpus=zoo_corpus.location, out=str(run / "evaluation"), best_of=2, num_tasks=3
    )
    return evaluate(config)


def test_every_row_is_measured_for_every_split_and_architecture(result: Evaluation) -> None:
    expected = {
        "original",
        "reconstructed",
        "generated",
        "finetuned_1",
        "finetuned_5",
        "token_prior",
        "random",
        "shuffled",
    }
    expected |= {"shared_start", "average", "gaussian", "nearest_condition", "nearest_loss", "average_best"}
    expected |= {"noise", "gradient", "start_finetuned_1", "start_finetuned_5"}
    expected |= {"nearest_finetuned_1", "nearest_finetuned_5", "random_finetuned_1", "random_finetuned_5"}
    assert {row.name for row in result.rows} == expected
    assert len(result.ladder) == len(expected) * 2 * len(result.layouts)
    assert all(0 <= row.accuracy <= 1 and row.num_networks == 3 for row in result.ladder)
    assert result.num_test_images == 597


def test_figures_are_means_in_percent(result: Evaluation) -> None:
    for split in ("seen", "unseen"):
        rows = [row.accuracy for row in result.ladder if (row.split, row.row) == (split, "gradient")]
        assert result.figures[f"{split}_gradient"] == pytest.approx(100 * sum(rows) / len(rows), abs=1e-3)
    figures = result.figures
    assert figures["unseen_nearest"] == max(figures["unseen_nearest_condition"], figures["unseen_nearest_loss"])


def test_intervals_are_of_95_percent_over_the_tasks(result: Evaluation) -> None:
    assert result.novelty is not None
    judged = [row for row in result.ladder if row.row in ("generated", "original", "noise")]
    for row in judged:
        of_row = [
            network.accuracy
            for network in result.novelty.rows
            if (network.kind, network.split, network.layout) == (row.row, row.split, row.layout)
        ]
        assert row.accuracy == pytest.approx(statistics.fmean(of_row), abs=1e-4)
        assert row.ci95 == pytest.approx(1.96 * statistics.stdev(of_row) / len(of_row) ** 0.5, abs=1e-4)
    # Networks at chance are all alike and would show no width.
    assert max(row.ci95 for row in judged) > 0.005


def test_claims_say_what_the_figures_say(result: Evaluation) -> None:
    shown = {name: round(value, 1) for name, value in result.figures.items()}
    held = {claim.text: claim.holds for claim in result.claims}
    generated, nearest = shown["unseen_generated"], shown["unseen_nearest"]
    text = "On unseen tasks, generated networks score above the nearest stored networks"
    assert held[f"{text} ({generated} against {nearest} %)."] == (generated > nearest)


def test_codebook_use_counts_every_heldout_token(result: Evaluation, zoo_corpus: Corpus) -> None:
    assert result.codebook is not None
    per_level = [sum(counts) for counts in result.codebook.usage]
    num_chunks = sum(
        -(-network.layout.num_values // 16) * zoo_corpus.select(layout_id=layout_id, split="heldout").num_rows
        for layout_id, network in zoo_corpus.networks.items()
    )
    assert per_level == [num_chunks] * 3


def test_the_tokenisers_figures_stand_beside_the_ladder(result: Evaluation, run: Path) -> None:
    assert result.tokenizer is not None
    written = json.loads((run / "evaluation" / "evaluation.json").read_text())["tokenizer"]
    assert written == json.loads(json.dumps(asdict(result.tokenizer)))
    report = TokenizerReport.from_json(written)
    assert [split.split for split in report.splits] == ["training", "held out"]
    assert report.splits[1].original_accuracy is not None


def test_the_same_seed_gives_the_same_result(result: Evaluation, run: Path, zoo_corpus: Corpus) -> None:
    config = EvaluateConfig(
        generator=str(run), corpus=zoo_corpus.location, out=str(run / "again"), best_of=2, num_tasks=3
    )
    again = evaluate(config)
    assert again.figures == result.figures
    assert json.loads((run / "again" / "evaluation.json").read_text())["ladder"] == [
        asdict(cell) for cell in again.ladder
    ]


def test_no_more_networks_are_held_than_a_block_and_the_candidates(
    run: Path, zoo_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each split of the corpus has more networks than that, at each architecture."""
    monkeypatch.setattr("raywgen.corpus.at_once._NETWORKS", 4)
    config = EvaluateConfig(
        generator=str(run),
        corpus=zoo_corpus.location,
        out=str(run / "bounded"),
        best_of=2,
        num_tasks=1,
        finetune_epochs=[1],
        gradient_steps=1,
    )
    with NetworksHeld([network.layout for network in zoo_corpus.networks.values()], chunk_length=16) as held:
        bounded = evaluate(config)
    assert held.most == 4, held.function
    assert bounded.tokenizer is not None
    assert all(split.num_networks > 2 * 4 for split in bounded.tokenizer.splits)


def test_a_generator_of_other_layouts_is_refused(run: Path, zoo_corpus: Corpus, tmp_path: Path) -> None:
    copy = tmp_path / "igpg"
    shutil.copytree(run / "generator", copy / "generator")
    content = json.loads((copy / "generator" / "generator.json").read_text())
    first = next(iter(content["layouts"]))
    del content["layouts"][first]
    (copy / "generator" / "generator.json").write_text(json.dumps(content))
    with pytest.raises((EvaluationError, BundleError)):
        evaluate(EvaluateConfig(generator=str(copy), corpus=zoo_corpus.location, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_missing_generator_is_named(zoo_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="raywgen train"):
        evaluate(EvaluateConfig(generator=str(tmp_path), corpus=zoo_corpus.location, out=str(tmp_path / "out")))
