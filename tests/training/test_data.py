from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from raywgen.corpus import Corpus
from raywgen.generators.igpg import IGPG, IGPGConfig
from raywgen.tasks import SAMConfig
from raywgen.training.batch_plan import StageView
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.rows import LayoutRows, layout_rows, policy_names
from raywgen.zoo import ZooConfig
from raywgen.zoo.config import ZooOptimizer
from tests.conftest import make_zoo
from tests.training.whole_plan import WholePlan


def rows_of(corpus: Corpus) -> list[LayoutRows]:
    return layout_rows(corpus, ["train"])


def values_of(rows: LayoutRows) -> torch.Tensor:
    return rows.values(torch.arange(len(rows)))


def order(
    rows: list[LayoutRows], rank: int = 0, num_workers: int = 1, seed: int = 3, augment: str = "", shot: int = 0
) -> WholePlan:
    return WholePlan(
        rows,
        seed=seed,
        num_condition_samples=5,
        num_query_samples=7,
        rank=rank,
        num_workers=num_workers,
        augment=augment,
        shot=shot,
    )


def test_parts_of_all_workers_are_the_whole_batch(zoo_corpus: Corpus) -> None:
    rows = rows_of(zoo_corpus)
    whole_order, parts = order(rows), [order(rows, rank, 2) for rank in range(2)]
    for step in range(12):
        whole = whole_order.batch(step, 8)
        for rank, part_order in enumerate(parts):
            part = part_order.batch(step, 8)
            assert torch.equal(part.values_BD, whole.values_BD[rank::2])
            assert torch.equal(part.sample_index_B, whole.sample_index_B[rank::2])
            assert torch.equal(part.condition.samples_BSF, whole.condition.samples_BSF[rank::2])
            assert torch.equal(part.query.labels_BS, whole.query.labels_BS[rank::2])
            assert part.condition.instructions == whole.condition.instructions[rank::2]
            assert torch.equal(part_order.whole_batch(step, 8).values_BD, whole.values_BD)


def test_an_epoch_holds_every_network_once(zoo_corpus: Corpus) -> None:
    rows = rows_of(zoo_corpus)
    per_layout = len(rows[0].tasks)
    batches = [order(rows).batch(step, 4) for step in range(0, 2 * per_layout // 4, len(rows))]
    seen = Counter(tuple(value_D.tolist()) for batch in batches for value_D in batch.values_BD)
    stored = Counter(tuple(value_D.tolist()) for value_D in values_of(rows[0]))
    assert seen == stored


def test_layouts_take_turns_and_epochs_differ(zoo_corpus: Corpus) -> None:
    rows = rows_of(zoo_corpus)
    drawn = order(rows)
    assert [drawn.batch(step, 4).layout.id for step in range(4)] == 2 * [part.layout.id for part in rows]
    steps_per_epoch = len(rows[0].tasks) // 4 * len(rows)
    first, second = drawn.batch(0, 4), drawn.batch(steps_per_epoch, 4)
    assert not torch.equal(first.values_BD, second.values_BD)
    assert not torch.equal(first.values_BD, order(rows, seed=4).batch(0, 4).values_BD)


def test_a_batch_can_be_drawn_again_out_of_order(zoo_corpus: Corpus) -> None:
    rows = rows_of(zoo_corpus)
    going = order(rows)
    batches = [going.batch(step, 4) for step in range(9)]
    assert torch.equal(order(rows).batch(8, 4).values_BD, batches[8].values_BD)


def test_conditions_and_queries_are_training_samples_of_the_networks_own_task(zoo_corpus: Corpus) -> None:
    rows = rows_of(zoo_corpus)
    batch = order(rows).batch(0, 6)
    by_instruction = {task.instruction: task for task in rows[0].tasks}
    for index, instruction in enumerate(batch.condition.instructions):
        task = by_instruction[instruction]
        known = {(*x, y) for x, y in zip(map(tuple, task.train_x_SF.tolist()), task.train_y_S.tolist(), strict=True)}
        for part in (batch.condition, batch.query):
            drawn = zip(part.samples_BSF[index].tolist(), part.labels_BS[index].tolist(), strict=True)
            assert all((*x, y) in known for x, y in drawn)


def test_only_a_stage_that_judges_networks_gets_queries(zoo_corpus: Corpus) -> None:
    stages = IGPG(IGPGConfig(), measure_normalizers(zoo_corpus), data_spec(zoo_corpus)).stages()
    seen = {}
    for stage in stages:
        batch, _ = order(rows_of(zoo_corpus)).for_stage(0, 4, StageView(stage, 0, 0))
        assert batch.condition.samples_BSF.shape[:2] == (4, 5)
        seen[stage.name] = batch.query.samples_BSF.shape[1], batch.query.labels_BS.shape[1]
    assert seen == {"tokenizer": (0, 0), "prior": (0, 0), "task_loss": (7, 7)}


@pytest.mark.parametrize("shot", [0, 2])
def test_images_of_queries_are_changed_alike_on_any_number_of_workers(zoo_corpus: Corpus, shot: int) -> None:
    rows = rows_of(zoo_corpus)
    plain, changed = (order(rows, augment=each, shot=shot).batch(1, 6) for each in ("", "shift-1"))
    assert torch.equal(plain.condition.samples_BSF, changed.condition.samples_BSF)
    assert torch.equal(plain.query.labels_BS, changed.query.labels_BS)
    is_same_BS = (plain.query.samples_BSF == changed.query.samples_BSF).all(dim=2)
    assert 0 < int(is_same_BS.sum()) < is_same_BS.numel() / 2  # One of nine places is that of before.
    part = order(rows, 1, 2, augment="shift-1", shot=shot).batch(1, 6)
    assert torch.equal(part.query.samples_BSF, changed.query.samples_BSF[1::2])
    assert not torch.equal(part.query.samples_BSF[0], part.query.samples_BSF[1])


def test_a_query_is_drawn_apart_from_its_condition(zoo_corpus: Corpus) -> None:
    """Both are drawn from a thousand samples: a few may meet by chance, not one in the same place after another."""
    batch = order(rows_of(zoo_corpus)).batch(0, 32)
    same_BS = (batch.condition.samples_BSF == batch.query.samples_BSF[:, :5]).all(dim=2)
    assert same_BS.shape == (32, 5)
    assert int(same_BS.sum()) < 8


def test_every_network_of_every_step_is_shown_samples_of_its_own(zoo_corpus: Corpus) -> None:
    """Networks of one task, and one network in two epochs, meet other samples, in the condition and in the query."""
    rows = rows_of(zoo_corpus)
    drawn = order(rows)
    batches = [drawn.batch(step, 4) for step in range(0, len(rows) * 2 * len(rows[0].tasks) // 4, len(rows))]
    for part in ("condition", "query"):
        shown = [
            (name, tuple(samples_SF.flatten().tolist()))
            for batch in batches
            for name, samples_SF in zip(
                getattr(batch, part).instructions, getattr(batch, part).samples_BSF, strict=True
            )
        ]
        assert len(shown) == 2 * len(rows[0].tasks)
        assert len(set(shown)) == len(shown), part


def test_references_normalise_training_networks_to_unit_scale(zoo_corpus: Corpus) -> None:
    for layout_id, (layout, normalizer) in measure_normalizers(zoo_corpus).items():
        base = zoo_corpus.base_values(layout_id)
        assert base is not None
        assert torch.equal(normalizer.base_D, base)
        values = zoo_corpus.values(zoo_corpus.select(layout_id=layout_id, split="train"))
        start = 0
        for spec in layout.generated:
            piece = normalizer.normalise(values)[:, start : start + spec.num_values]
            # A tensor behind dead units never moves; the others to what float32 sums of some thousand values give.
            moved = float(not torch.equal(values[:, start], base[start].expand(len(values))) or bool(piece.any()))
            torch.testing.assert_close(piece.std(unbiased=False), torch.tensor(moved), rtol=1e-4, atol=0)
            start += spec.num_values


def test_data_spec(zoo_corpus: Corpus) -> None:
    spec = data_spec(zoo_corpus)
    assert (spec.num_features, spec.max_classes) == (64, 2)


def test_policies_are_named_as_a_zoo_names_its_optimisers(tmp_path: Path) -> None:
    optimizers = [
        ZooOptimizer(optimizer="sgd", momentum=0.0),
        ZooOptimizer(optimizer="sgd", momentum=0.5),
        ZooOptimizer(optimizer="adam", sam=SAMConfig(rho=0.05)),
        ZooOptimizer(optimizer="adam", sam=SAMConfig(rho=0.05, adaptive=True)),
    ]
    config = ZooConfig(
        networks=[[64, 4, 2]],
        optimizers=optimizers,
        num_seen_tasks=2,
        num_validation_tasks=0,
        num_unseen_tasks=0,
        seeds_per_task=1,
        num_steps=2,
        checkpoint_steps=[2],
    )
    corpus = make_zoo(config, tmp_path / "corpus")
    wanted = {fit.label for fit in config.fits()}
    assert wanted == {"sgd", "sgd-m0.5", "adam-sam0.05", "adam-asam0.05"}
    assert set(policy_names(corpus)) == wanted | {"none"}
    assert set(data_spec(corpus).policies) == wanted
    batch = order(rows_of(corpus)).batch(0, 8)
    assert sorted(batch.condition.policies) == sorted([*wanted, *wanted])
    (rows,) = rows_of(corpus)
    policy_of = {
        tuple(value_D): policy for value_D, policy in zip(values_of(rows).tolist(), rows.policies, strict=True)
    }
    assert batch.condition.policies == tuple(policy_of[tuple(value_D)] for value_D in batch.values_BD.tolist())
    assert batch.first(2).condition.policies == batch.condition.policies[:2]
