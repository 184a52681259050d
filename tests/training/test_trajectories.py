"""Local targets along trajectories, and what meta-training makes of them over several workers.

Shape legend: N checkpoints, k local targets, D values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.generators import OptimizerConfig
from raywgen.generators.bundle import build_generator, load_bundle
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.mcdi import McDi, McDiConfig
from raywgen.generators.mcdi.config import DenoiserConfig, DiffusionConfig, McDiTaskLossConfig
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.engine import LocalEngine
from raywgen.training.rows import LayoutRows, TrajectoryError, layout_rows, trajectory_rows
from raywgen.weights import KeyedNoise, WeightBatch
from tests.builders import SMALL, layout_of, network
from tests.training.held_weights import HeldWeights
from tests.training.whole_plan import WholePlan

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(trajectories: dict[str, list[int]], seed: int = 0) -> LayoutRows:
    """Checkpoints in any order; each one's values and task are its number."""
    facts = [(name, step) for name, steps in trajectories.items() for step in steps]
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed)).tolist()
    facts = [facts[place] for place in order]
    layout = layout_of(SMALL)
    return LayoutRows(
        layout=layout,
        module=lambda: network(SMALL),
        weights=HeldWeights(torch.arange(len(facts)).float().unsqueeze(1).expand(-1, layout.num_values)),
        index_N=torch.arange(len(facts)),
        tasks=list(range(len(facts))),  # pyright: ignore[reportArgumentType]
        trajectories=[name for name, _ in facts],
        steps=[step for _, step in facts],
        policies=["adam"] * len(facts),
        ids=[f"{name}-{step}" for name, step in facts],
    )


def chosen_steps(rows: LayoutRows, num_targets: int) -> dict[str, list[int]]:
    """Of each trajectory; looks whether everything else fits them."""
    found = trajectory_rows(rows, num_targets)
    row_N = torch.arange(len(found))
    targets_NAD = found.targets(row_N)
    assert targets_NAD is not None
    assert len(found.tasks) == len(found.steps) == len(found.trajectories) == len(found.values(row_N))
    assert torch.equal(targets_NAD[:, -1], found.values(row_N))
    chosen = {}
    for n, name in enumerate(found.trajectories):
        places = targets_NAD[n, :, 0].long().tolist()
        assert {rows.trajectories[place] for place in places} == {name}
        assert found.tasks[n] == places[-1]
        chosen[name] = [rows.steps[place] for place in places]
        assert found.steps[n] == chosen[name][-1]
    assert len(chosen) == len(found.trajectories)
    return chosen


@given(
    steps=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=12, unique=True), min_size=1, max_size=4),
    num_targets=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
def test_local_targets_are_the_checkpoints_nearest_to_even_spacing(
    steps: list[list[int]], num_targets: int, seed: int
) -> None:
    trajectories = {f"run/{place}": of_one for place, of_one in enumerate(steps)}
    nearest, is_enough = {}, True
    for name, of_one in trajectories.items():
        later = [step for step in of_one if step > 0]
        if not later:
            continue
        wanted = [max(later) * i for i in range(1, num_targets + 1)]
        # In units of 1 / k, so that distances are whole; of two at the same distance the earlier one.
        nearest[name] = [min(later, key=lambda step, w=w: (abs(num_targets * step - w), step)) for w in wanted]
        is_enough = is_enough and len(set(nearest[name])) == num_targets
    rows = rows_of(trajectories, seed)
    if is_enough and nearest:
        assert chosen_steps(rows, num_targets) == nearest
    else:
        with pytest.raises(TrajectoryError, match="checkpoint_steps"):
            trajectory_rows(rows, num_targets)


def test_too_few_checkpoints_are_told_with_their_steps_and_the_remedy() -> None:
    rows = rows_of({"run/a": [0, 30, 60, 90], "run/b": [0, 80, 90]})
    with pytest.raises(TrajectoryError, match=r"'run/b'.*\[80, 90\].*3 evenly.*checkpoint_steps, or lower num_targets"):
        trajectory_rows(rows, 3)
    assert chosen_steps(rows, 2) == {"run/a": [30, 90], "run/b": [80, 90]}


def test_the_start_alone_is_no_trajectory() -> None:
    assert chosen_steps(rows_of({"run/a": [0, 30], "run/b": [0]}), 1) == {"run/a": [30]}
    with pytest.raises(TrajectoryError, match="no trajectory has a checkpoint after its start"):
        trajectory_rows(rows_of({"run/a": [0]}), 1)


def order_of(corpus: Corpus, rank: int = 0, num_workers: int = 1, **changes: int) -> WholePlan:
    rows = layout_rows(corpus, ["train"])
    settings: dict[str, Any] = {
        "num_condition_samples": 5,
        "num_query_samples": 7,
        "shot": 2,
        "num_targets": 2,
    } | changes
    return WholePlan(rows, seed=3, rank=rank, num_workers=num_workers, **settings)


def test_batches_hold_the_ends_of_trajectories_with_their_local_targets(zoo_corpus: Corpus) -> None:
    facts = zoo_corpus.facts.to_pylist()
    by_step = {(row["trajectory_id"], row["step"]): row for row in facts if row["split"] == "train"}
    order = order_of(zoo_corpus)
    (rows,) = [rows for rows in order.rows if rows.layout.id == order.batch(0, 4).layout.id]
    assert len(rows.tasks) == len({name for name, _ in by_step if by_step[name, 120]["layout_id"] == rows.layout.id})
    targets_NAD = rows.targets(torch.arange(len(rows)))
    assert targets_NAD is not None
    for n, name in enumerate(rows.trajectories):
        for i, step in enumerate((100, 120)):
            table = zoo_corpus.select(checkpoint_id=by_step[name, step]["checkpoint_id"])
            assert torch.equal(zoo_corpus.values(table)[0], targets_NAD[n, i])
    for step in range(4):
        batch = order.batch(step, 6)
        assert batch.targets_BAD is not None
        assert batch.targets_BAD.shape == (6, 2, batch.layout.num_values)
        assert torch.equal(batch.targets_BAD[:, -1], batch.values_BD)
        assert not torch.equal(batch.targets_BAD[:, 0], batch.values_BD)


def test_without_local_targets_every_checkpoint_is_a_row(zoo_corpus: Corpus) -> None:
    plain, ends = order_of(zoo_corpus, num_targets=0), order_of(zoo_corpus)
    assert plain.batch(0, 4).targets_BAD is None
    assert [len(rows.tasks) for rows in plain.rows] == [2 * len(rows.tasks) for rows in ends.rows]


def test_parts_of_all_workers_are_the_whole_few_shot_batch(zoo_corpus: Corpus) -> None:
    whole_order, parts = order_of(zoo_corpus), [order_of(zoo_corpus, rank, 2) for rank in range(2)]
    for step in range(6):
        whole = whole_order.batch(step, 8)
        assert whole.condition.labels_BS.tolist() == 8 * [[0, 0, 1, 1]]
        assert whole.query.labels_BS.shape == (8, 7)
        for rank, order in enumerate(parts):
            part = order.batch(step, 8)
            assert part.targets_BAD is not None
            assert whole.targets_BAD is not None
            assert torch.equal(part.targets_BAD, whole.targets_BAD[rank::2])
            assert torch.equal(part.condition.samples_BSF, whole.condition.samples_BSF[rank::2])
            assert torch.equal(part.query.samples_BSF, whole.query.samples_BSF[rank::2])


def test_no_shot_draws_conditions_at_random(zoo_corpus: Corpus) -> None:
    batch = order_of(zoo_corpus, shot=0).batch(0, 8)
    assert batch.condition.labels_BS.shape == (8, 5)


def meta_config(**denoiser: Any) -> McDiConfig:
    optimizer = OptimizerConfig(kind="sgd", learning_rate=0.5, grad_clip=100.0, weight_decay=0.0, warmup_steps=0)
    outer: dict[str, Any] = {"num_steps": 6, "batch_size": 8, "optimizer": optimizer, "inner_rate": 0.05}
    return McDiConfig(
        diffusion=DiffusionConfig(num_targets=2),
        network=NetworkConfig(width=16, num_layers=1, num_heads=2),
        denoiser=DenoiserConfig(**(outer | denoiser)),
        task_loss=McDiTaskLossConfig(num_steps=0),
    )


def generator_for(corpus: Corpus, **denoiser: Any) -> McDi:
    settings = meta_config(**denoiser)
    built = build_generator("mcdi", settings, measure_normalizers(corpus), data_spec(corpus), seed=0)
    assert isinstance(built, McDi)
    return built


def keyed(batch: WeightBatch) -> KeyedNoise:
    return KeyedNoise(0, batch.sample_index_B)


@pytest.mark.parametrize("num_workers", [2, 4])
@pytest.mark.parametrize("meta", ["reptile", "joint"])
def test_the_mean_gradient_of_all_workers_is_that_of_the_whole_meta_batch(
    meta: str, num_workers: int, zoo_corpus: Corpus
) -> None:
    def gradient(batch: WeightBatch) -> dict[str, Tensor]:
        (stage,) = generator_for(zoo_corpus, meta=meta).stages()
        stage.train()(batch, keyed(batch)).loss.backward()
        return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}

    whole = gradient(order_of(zoo_corpus).batch(1, 8))
    parts = [gradient(order_of(zoo_corpus, rank, num_workers).batch(1, 8)) for rank in range(num_workers)]
    assert len(whole) > 10
    for name, expected in whole.items():
        mean = torch.stack([part[name] for part in parts]).mean(dim=0)
        # Differences of parameters near 1 in float32: 1e-7 of them.
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=5e-7, msg=lambda m, n=name: n + m)
    assert any(not torch.allclose(parts[0][name], whole[name], rtol=1e-2, atol=1e-6) for name in whole)


def test_steps_of_descent_by_averaged_parts_are_those_of_one_worker(zoo_corpus: Corpus) -> None:
    """What two workers do, in one process: each adapts to its own tasks, their gradients are averaged."""
    (alone,), (shared,) = generator_for(zoo_corpus).stages(), generator_for(zoo_corpus).stages()
    start = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    engine, orders = LocalEngine(alone), [order_of(zoo_corpus, rank, 2) for rank in range(2)]
    for step in range(4):
        batch = order_of(zoo_corpus).batch(step, 8)
        engine.train_step(batch, keyed(batch), 0.5)
        shared.zero_grad()
        for order in orders:
            part = order.batch(step, 8)
            (shared.train()(part, keyed(part)).loss / 2).backward()
        with torch.no_grad():
            for parameter in shared.parameters():
                parameter -= 0.5 * parameter.grad  # pyright: ignore[reportOperatorIssue]
    for (name, mine), theirs in zip(alone.named_parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=5e-6, msg=lambda m, n=name: n + m)
    assert max(float((p.detach() - start[name]).abs().max()) for name, p in alone.named_parameters()) > 1e-2


def train_config(corpus: Corpus, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"log_every": 1, "checkpoint_every": 2, "validate_every": 3, "num_workers": 0}
    settings |= {"shot": 2, "num_query_samples": 9, "method": "mcdi", "generator": meta_config()} | changes
    return TrainConfig(corpus=corpus.location, out=str(out), **settings)


def test_a_run_by_descent_trains_validates_and_leaves_a_generator(zoo_corpus: Corpus, tmp_path: Path) -> None:
    launch([train_config(zoo_corpus, tmp_path)])
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(6))
    assert all(row["consistency"] > 0 for row in rows)
    assert all("val_consistency" in row for row in rows if row["step"] in (0, 3, 5))
    assert isinstance(load_bundle(tmp_path / "generator"), McDi)


def test_a_corpus_of_too_short_trajectories_is_refused(zoo_corpus: Corpus, tmp_path: Path) -> None:
    settings = meta_config()
    settings.diffusion.num_targets = 3
    with pytest.raises(TrajectoryError, match=r"\[100, 120\].*lower num_targets"):
        launch([train_config(zoo_corpus, tmp_path, generator=settings)])
