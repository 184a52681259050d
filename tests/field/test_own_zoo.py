"""A zoo of a network with ties and a mask is trained as that network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raywgen.corpus import Corpus
from raywgen.tasks import balanced_accuracy, build_task
from raywgen.trust import trusting
from raywgen.zoo import ZooConfig, train_zoo
from tests.field.networks import TiedAndMasked

CONFIG = ZooConfig(
    networks=[{"name": "tests.field.networks:TiedAndMasked"}],
    num_seen_tasks=2,
    num_validation_tasks=1,
    num_unseen_tasks=1,
    seeds_per_task=1,
    num_steps=80,
    checkpoint_steps=[80],
    num_condition_samples=8,
    execution="stacked",
)


@pytest.fixture(scope="module", params=["stacked", "sequential"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = str(tmp_path_factory.mktemp(request.param) / "zoo")
    with trusting("tests"):
        return train_zoo(replace(CONFIG, execution=request.param), root, distributed=False)


def test_each_network_is_stored_as_what_was_measured(zoo: Corpus) -> None:
    (network,) = zoo.networks.values()
    assert network.layout.num_values == sum(p.numel() for p in TiedAndMasked().parameters())
    start = zoo.state_dict(zoo.select(split="base").column("checkpoint_id")[0].as_py())
    rows = zoo.query(["step=80"]).to_pylist()
    for row in rows:
        module, state = TiedAndMasked().eval(), zoo.state_dict(row["checkpoint_id"])
        assert state["second.weight"].data_ptr() == state["third.weight"].data_ptr()
        assert not torch.equal(state["second.weight"], start["second.weight"])
        module.load_state_dict(state)
        task = build_task(zoo.tasks[row["task_id"]].recipe)
        accuracy = float(balanced_accuracy(module(task.test_x_SF).unsqueeze(0), task.test_y_S)[0])
        assert row["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert max(row["test_accuracy"] for row in rows) > 0.6


def test_both_ways_train_the_same(tmp_path: Path) -> None:
    values = []
    for execution in ("stacked", "sequential"):
        with trusting("tests"):
            corpus = train_zoo(
                replace(CONFIG, execution=execution, num_steps=5, checkpoint_steps=[5]),
                str(tmp_path / execution),
                distributed=False,
            )
        values.append(corpus.values(corpus.facts.sort_by("checkpoint_id")))
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-4)
