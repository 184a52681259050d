"""Evaluation of adapters whose heads are fitted, on tasks with different numbers of test sentences."""

from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.corpus import Corpus
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.evaluate import evaluate
from raywgen.tasks import build_task
from tests.generation.test_adapter_sink import corpus, folder, run

__all__ = ["corpus", "folder", "run"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_row_is_measured_with_heads_fitted_to_the_examples(corpus: Corpus, run: str, tmp_path: Path) -> None:
    sizes = {len(build_task(task.recipe).test_y_S) for task in corpus.tasks.values()}
    assert len(sizes) > 1
    config = EvaluateConfig(
        generator=run, corpus=corpus.location, out=str(tmp_path), best_of=2, num_tasks=2, finetune_epochs=[1]
    )
    found = {(row.split, row.row): row.accuracy for row in evaluate(config).ladder}
    assert {"original", "generated", "average", "random", "gradient", "finetuned_1"} <= {name for _, name in found}
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert found["unseen", "average"] > 0.6, "the head of an average of heads is at chance for unseen tasks"
