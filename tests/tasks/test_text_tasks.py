from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raywgen.tasks import FitConfig, FitData, Recorded, TaskError, build_network, build_task, fit, repeat_state

SHARED = Path(__file__).parents[2] / "../shared/data"


def write(path: Path, split: list[str] | None = None) -> str:
    sentences = [f"a {'good' if i % 2 else 'bad'} film number {i}" for i in range(40)]
    columns = {"sentence": sentences, "label": [i % 2 for i in range(40)]} | ({"split": split} if split else {})
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_a_fifth_of_each_class_is_held_out_where_there_are_no_parts(tmp_path: Path) -> None:
    task = build_task({"name": "texts", "path": write(tmp_path / "films.parquet"), "num_features": 64})
    assert task.train_x_SF.shape == (32, 64)
    assert task.test_y_S.bincount().tolist() == [4, 4]
    torch.testing.assert_close(task.train_x_SF.norm(dim=1), torch.ones(32))
    again = build_task(task.recipe)
    assert torch.equal(again.train_x_SF, task.train_x_SF)


def test_parts_of_the_file_are_kept(tmp_path: Path) -> None:
    parts = ["train"] * 20 + ["validation"] * 8 + ["test"] * 12
    task = build_task({"name": "texts", "path": write(tmp_path / "parts.parquet", parts)})
    assert (len(task.train_y_S), len(task.test_y_S)) == (20, 12)


def test_what_cannot_be_a_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no row is left to train on"):
        build_task({"name": "texts", "path": write(tmp_path / "t.parquet", ["test"] * 40)})
    with pytest.raises(TaskError, match="num_features=0"):
        build_task({"name": "texts", "path": "any.parquet", "num_features": 0})
    with pytest.raises(TaskError, match=r"nothing\.parquet"):
        build_task({"name": "texts", "path": str(tmp_path / "nothing.parquet")})


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_real_questions_can_be_learned() -> None:
    task = build_task({"name": "texts", "path": str(SHARED / "text-trec.parquet"), "num_features": 512})
    module = build_network({"name": "mlp", "widths": [512, task.num_classes]})
    config = FitConfig(num_steps=300, learning_rate=0.02, batch_size=64)
    (end,) = fit(
        module,
        Recorded(step=0, state_N=repeat_state(module.state_dict(), 1)),
        FitData(x=task.train_x_SF, labels_NS=task.train_y_S),
        config,
        order_seeds=[0],
        record_steps=[300],
    )
    module.load_state_dict({name: tensor[0] for name, tensor in end.state_N.items()})
    right_S = module(task.test_x_SF).argmax(dim=1) == task.test_y_S
    # The most frequent of six classes would be right for fewer than 0.3.
    assert float(right_S.float().mean()) > 0.6
