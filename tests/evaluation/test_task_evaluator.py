"""The bench: which stored networks, originals and candidates it lays beside each other, and by what it judges them."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from raywgen.corpus import Corpus
from raywgen.evaluation.baselines import BASELINES
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.task_evaluator import TaskEvaluator, generated_candidates, make_evaluator
from raywgen.generators.bundle import build_generator
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.tasks import balanced_cross_entropy, build_network
from raywgen.training.data import data_spec, measure_normalizers
from tests.evaluation.stored import every_value

pytestmark = pytest.mark.usefixtures("one_thread")


def evaluator_of(corpus: Corpus, split: str) -> TaskEvaluator:
    layout_id, (_, normalizer) = next(iter(measure_normalizers(corpus).items()))
    made = make_evaluator(corpus, layout_id, split, normalizer, num_tasks=4)
    assert made is not None
    return made


@pytest.mark.parametrize(("split", "of"), [("seen", "heldout"), ("unseen", "unseen")])
def test_originals_are_ends_of_trajectories_of_the_very_task(zoo_corpus: Corpus, split: str, of: str) -> None:
    evaluator = evaluator_of(zoo_corpus, split)
    for task, original_D in zip(evaluator.tasks, evaluator.originals_TD, strict=True):
        rows = zoo_corpus.select(layout_id=evaluator.layout.id, split=of, task_id=task.id)
        ends = zoo_corpus.select(layout_id=evaluator.layout.id, split=of, task_id=task.id, step=max_step(rows))
        assert bool((zoo_corpus.values(ends) == original_D).all(dim=1).any())


def test_stored_networks_are_the_ends_of_all_training_trajectories(zoo_corpus: Corpus) -> None:
    stored = evaluator_of(zoo_corpus, "unseen").stored
    layout_id = next(iter(measure_normalizers(zoo_corpus)))
    rows = zoo_corpus.select(layout_id=layout_id, split="train")
    ends = zoo_corpus.select(layout_id=layout_id, split="train", step=max_step(rows))
    names = ends.column("task_id").to_pylist()
    assert len(stored) == len(set(rows.column("trajectory_id").to_pylist())) == len(names)
    values_RD = zoo_corpus.values(ends)
    for value_D, task_id, instruction in zip(every_value(stored), stored.task_ids, stored.instructions, strict=True):
        found = [names[row] for row in (values_RD == value_D).all(dim=1).nonzero().flatten().tolist()]
        assert task_id in found
        assert instruction == zoo_corpus.tasks[task_id].instruction


def test_the_loss_on_the_examples_is_that_of_each_candidate_on_its_own_task(zoo_corpus: Corpus) -> None:
    evaluator = evaluator_of(zoo_corpus, "unseen")
    values_TnD = BASELINES["gaussian"](evaluator, EvaluateConfig(best_of=3))
    loss_Tn = evaluator.example_loss(values_TnD)
    module = build_network(zoo_corpus.networks[evaluator.layout.id].recipe).eval()
    for index, task in enumerate(evaluator.tasks):
        facts = zoo_corpus.tasks[task.id]
        for place, value_D in enumerate(values_TnD[index]):
            module.load_state_dict(evaluator.layout.unflatten(value_D), strict=True)
            with torch.no_grad():
                loss = balanced_cross_entropy(module(facts.samples_SF).unsqueeze(0), facts.labels_S)
            assert float(loss_Tn[index, place]) == pytest.approx(float(loss), abs=1e-5)


def test_candidates_of_a_task_are_written_from_different_noise(zoo_corpus: Corpus) -> None:
    evaluator = evaluator_of(zoo_corpus, "unseen")
    small = IGPGConfig(
        tokenizer=TokenizerConfig(quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=16),
        prior=PriorConfig(width=16, num_layers=1, num_heads=2),
    )
    generator = build_generator("igpg", small, measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0)
    with torch.no_grad():
        for codebook_VK in generator.get_submodule("tokenizer.quantiser").get_buffer("codebooks_LVK"):
            codebook_VK.normal_(generator=torch.Generator().manual_seed(0))
    written = generated_candidates(evaluator, generator, 3, 1.0, 0)
    for values_nD in written.values_BD.view(len(evaluator.tasks), 3, -1):
        assert len(values_nD.unique(dim=0)) == 3


def max_step(rows: pa.Table) -> int:
    """Of some facts."""
    return max(rows.column("step").to_pylist())
