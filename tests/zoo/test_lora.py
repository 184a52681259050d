"""A zoo of adapters of one pretrained network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raywgen.corpus import Corpus
from raywgen.tasks import TaskError, balanced_accuracy, build_network, build_task
from raywgen.zoo import ZooConfig
from raywgen.zoo.config import ZooTasks
from raywgen.zoo.execution import choose_executions
from raywgen.zoo.plan import plan_zoo
from raywgen.zoo.replay import replay
from tests.conftest import make_zoo

BASE = {"name": "mlp", "widths": [64, 16, 10]}
FACTORS = {"0.lora_A": (2, 64), "0.lora_B": (16, 2), "2.lora_A": (2, 16), "2.lora_B": (10, 2), "2.bias": (10,)}


def config() -> ZooConfig:
    """Its base lies in the working directory."""
    adapter = {"name": "lora", "base": BASE, "weights": "base.safetensors", "rank": 2, "targets": ["weight"]}
    return ZooConfig(
        tasks=ZooTasks(kind="class-subsets", subset_size=3),
        networks=[adapter | {"train_head": ["2.bias"]}],
        num_seen_tasks=3,
        num_validation_tasks=1,
        num_unseen_tasks=1,
        seeds_per_task=2,
        num_steps=60,
        checkpoint_steps=[0, 60],
        learning_rate=0.02,
        num_condition_samples=8,
        stack_size=3,
    )


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    save_file(build_network(BASE).state_dict(), folder / "base.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return make_zoo(config(), folder / "corpus")


def test_a_corpus_holds_the_factors_and_where_their_base_lies(adapters: Corpus) -> None:
    (network,) = adapters.networks.values()
    assert network.name.startswith("lora-mlp-64-16-10-rank_2-")
    assert {spec.name: spec.shape for spec in network.layout.tensors} == FACTORS
    assert Path(network.recipe["weights"]).is_absolute()


def test_adapters_learn_their_tasks_and_load_strictly(adapters: Corpus) -> None:
    rows = [row for row in adapters.facts.to_pylist() if row["split"] != "base"]
    assert len(rows) == 5 * 2 * 2
    start, end = ([row["test_accuracy"] for row in rows if row["step"] == step] for step in (0, 60))
    assert sum(end) / len(end) > max(0.7, sum(start) / len(start) + 0.2)
    for row in rows[-4:]:
        module = build_network(adapters.networks[row["layout_id"]].recipe).eval()
        module.load_state_dict(adapters.state_dict(row["checkpoint_id"]), strict=True)
        task = build_task(adapters.tasks[row["task_id"]].recipe)
        accuracy = balanced_accuracy(module(task.test_x_SF).unsqueeze(0), task.test_y_S)
        assert row["test_accuracy"] == pytest.approx(float(accuracy), abs=0.02)


def test_an_adapter_is_trained_again_bit_for_bit(adapters: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(adapters.location).parent)
    row = next(row for row in adapters.facts.to_pylist() if row["split"] == "unseen" and row["step"] == 60)
    again = replay(adapters, row["trajectory_id"])[60]
    stored = adapters.state_dict(row["checkpoint_id"])
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.items())


def test_executions_are_named_as_in_the_plan(adapters: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(adapters.location).parent)
    assert list(choose_executions(config())) == [start.network.name for start in plan_zoo(config()).starts]


def test_a_missing_base_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=f"{tmp_path}/base.safetensors does not exist"):
        plan_zoo(config())
