"""Networks that people bring along: weights alone, then described, then trained on and generated like a zoo's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from raywgen.config import ConfigError
from raywgen.corpus import Corpus, CorpusError, verify_corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.derive import split
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.evaluate import EvaluationError, evaluate
from raywgen.evaluation.report import write_report
from raywgen.evaluation.tables import print_evaluation
from raywgen.evaluation.tokenizer_report import report_run
from raywgen.generation import GenerateConfig, generate
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.tasks import TaskError
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.zoo.describe import describe_corpus

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = "tasks: {digits: {name: digits-subset, labels: [1, 4, 7], instruction: Is it 1 or 4 or 7?}}"
NETWORKS = "networks: {narrow: {name: mlp, widths: [64, 6, 2]}, deep: {name: mlp, widths: [64, 5, 4, 2]}}"


@pytest.fixture
def brought(zoo_corpus: Corpus, tmp_path: Path) -> Corpus:
    """Files of two architectures, of which only that is known."""
    lines = ["path,architecture"]
    for name, layout_id in zip(("narrow", "deep"), zoo_corpus.networks, strict=True):
        ids = zoo_corpus.select(layout_id=layout_id, split="train").column("checkpoint_id").to_pylist()
        (tmp_path / "files" / name).mkdir(parents=True)
        for number, checkpoint_id in enumerate(ids):
            save_file(zoo_corpus.state_dict(checkpoint_id), tmp_path / "files" / name / f"{number}.safetensors")
        lines.append(f"{name}/*,{name}")
    (tmp_path / "facts.csv").write_text("\n".join(lines))
    sources = [str(tmp_path / "files")]
    return build_corpus(
        BuildConfig(out=str(tmp_path / "corpus"), sources=sources, facts=str(tmp_path / "facts.csv"), distributed=False)
    )


def with_description(corpus: Corpus, *parts: str) -> Corpus:
    path = Path(corpus.location).parent / "description.yaml"
    path.write_text("\n".join(parts))
    return describe_corpus(corpus.location, str(path))


def run(corpus: Corpus, task_loss_steps: int) -> TrainConfig:
    igpg = IGPGConfig(
        tokenizer=TokenizerConfig(
            num_steps=4, batch_size=8, quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=8
        ),
        prior=PriorConfig(num_steps=4, batch_size=8, width=16, num_layers=1, num_heads=2),
        task_loss=IGPGTaskLossConfig(num_steps=task_loss_steps, batch_size=4),
    )
    out = str(Path(corpus.location).parent / f"run-{task_loss_steps}")
    return TrainConfig(generator=igpg, corpus=corpus.location, out=out, num_workers=0, log_every=1)


def test_weights_alone_train_what_needs_no_task_and_refuse_the_rest_before_it_begins(brought: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"holds weights alone, and stage 'task_loss'.*corpus describe"):
        launch([run(brought, 2)])
    assert not Path(run(brought, 2).out).exists()
    launch([run(brought, 0)])
    assert {row["stage"] for row in read_metrics(run(brought, 0).out)} == {"tokenizer", "prior"}
    report = report_run(run(brought, 0).out)
    assert report is not None
    assert report.no_accuracy


def test_a_task_that_is_named_but_not_described_is_none(brought: Corpus) -> None:
    path = Path(brought.location).parent
    (path / "facts.csv").write_text("path,task_id\n*,digits\n")
    sources = [str(path / "files")]
    named = build_corpus(
        BuildConfig(out=str(path / "named"), sources=sources, facts=str(path / "facts.csv"), distributed=False)
    )
    assert set(named.facts.column("task_id").to_pylist()) == {"digits"}
    launch([run(named, 0)])
    report = report_run(run(named, 0).out)
    assert report is not None
    assert report.no_accuracy


def test_described_networks_are_trained_by_what_they_do(brought: Corpus) -> None:
    before = {row["checkpoint_id"]: state for row, state in brought.checkpoints()}
    corpus = with_description(brought, TASK, NETWORKS)
    assert not verify_corpus(corpus.location)
    assert corpus.tasks["digits"].instruction == "Is it 1 or 4 or 7?"
    assert len(corpus.tasks["digits"].labels_S) == 64
    assert set(corpus.facts.column("task_id").to_pylist()) == {"digits"}
    assert {network.name: network.recipe["widths"] for network in corpus.networks.values()} == {
        "narrow": [64, 6, 2],
        "deep": [64, 5, 4, 2],
    }
    for row, state in corpus.checkpoints():
        assert all(torch.equal(tensor, before[row["checkpoint_id"]][name]) for name, tensor in state.items())
    launch([run(corpus, 2)])
    assert {row["stage"] for row in read_metrics(run(corpus, 2).out)} == {"tokenizer", "prior", "task_loss"}


@pytest.mark.parametrize("heldout", [0.0, 0.25])
def test_described_networks_are_judged_by_what_there_is(brought: Corpus, heldout: float) -> None:
    corpus = with_description(brought, TASK, NETWORKS)
    if heldout:
        corpus = split(f"{corpus.location}-split", corpus, by="trajectory_id", heldout=heldout)
    launch([run(corpus, 2)])
    out = run(corpus, 2).out
    result = evaluate(
        EvaluateConfig(generator=out, corpus=corpus.location, out=f"{out}/evaluation", best_of=2, finetune_epochs=[1])
    )
    rows = {cell.row for cell in result.ladder}
    assert {"original", "generated", "nearest_loss", "average", "random_finetuned_1"} <= rows
    assert not {"shared_start", "gradient", "start_finetuned_1"} & rows  # they started each on their own
    assert {cell.split for cell in result.ladder} == {"seen"}
    assert ("novelty_distance" in result.figures) == bool(heldout)
    assert result.novelty is not None
    assert (result.novelty.verdict == "unjudged") == (not heldout)
    assert [claim.text.split(",")[0] for claim in result.claims] == ["On seen tasks", "On seen tasks"]
    print_evaluation(result, Console(width=200))
    assert "On seen tasks, generated networks reach" in Path(write_report(out)).read_text()


def test_described_networks_are_written_again(brought: Corpus, tmp_path: Path) -> None:
    corpus = with_description(brought, TASK, NETWORKS)
    launch([run(corpus, 0)])
    config = GenerateConfig(
        generator=run(corpus, 0).out, corpus=corpus.location, tasks="digits", out=str(tmp_path / "written"), best_of=2
    )
    rows = generate(config)
    assert sorted(row.network for row in rows) == ["deep", "narrow"]
    assert all(0 <= (row.test_accuracy or 0) <= 1 and Path(row.path).is_file() for row in rows)


def test_weights_alone_cannot_be_judged(brought: Corpus) -> None:
    launch([run(brought, 0)])
    out = run(brought, 0).out
    with pytest.raises(EvaluationError, match="weights alone; say what its networks do"):
        evaluate(EvaluateConfig(generator=out, corpus=brought.location, out=f"{out}/evaluation"))


def test_describing_again_replaces_what_was_said(brought: Corpus) -> None:
    with_description(brought, TASK, NETWORKS)
    corpus = with_description(brought, "tasks: {digits: {name: digits-subset, labels: [0, 2]}}")
    assert corpus.tasks["digits"].recipe["labels"] == [0, 2]
    assert all(network.recipe for network in corpus.networks.values())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "networks: {narow: {name: mlp, widths: [64, 6, 2]}}",
            CorpusError,
            "no network 'narow'; did you mean 'narrow'",
        ),
        (
            "networks: {narrow: {name: mlp, widths: [64, 7, 2]}}",
            TaskError,
            r"0.bias is \[6\] in the corpus, \[7\] in the recipe",
        ),
        ("networks: {narrow: {name: mlpp}}", TaskError, "unknown network 'mlpp'; did you mean 'mlp'"),
        ("tasks: {digits: {name: digit-subset}}", TaskError, "did you mean 'digits-subset'"),
        ("tasks: {digits: images}", ConfigError, "is no recipe"),
        ("tasks: {digits: {name: digits-subset, labels: [1], split: test}}", ConfigError, "seen, validation, unseen"),
        (
            "tasks: {a: {name: digits-subset, labels: [1]}, b: {name: digits-subset, labels: [2]}}",
            CorpusError,
            "no checkpoint is of task 'a' .its facts name none.; name it there by a column `task_id`",
        ),
        ("task: {}", ConfigError, "something else than"),
        ("tasks: [digits]", ConfigError, "tasks holds no names"),
        ("{", ConfigError, "cannot be read"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    brought: Corpus, text: str, error: type[Exception], message: str
) -> None:
    manifest = (Path(brought.location) / "manifest.json").read_bytes()
    with pytest.raises(error, match=message) as refused:
        with_description(brought, text)
    assert "\n" not in str(refused.value)
    assert (Path(brought.location) / "manifest.json").read_bytes() == manifest
