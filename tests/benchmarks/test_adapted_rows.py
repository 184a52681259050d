"""Rows that adapt by gradient steps learn, and see the features and images that they should."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch

from raywgen.benchmarks import few_shot_parts
from raywgen.benchmarks.adapted_rows import Adaptation, from_scratch, reptile_head
from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.few_shot_parts import Parts, TaskSource
from raywgen.corpus import Corpus
from raywgen.evaluation.few_shot import ReptileConfig, ReptileState
from raywgen.tasks.encoders import FrozenEncoder
from raywgen.tasks.networks.conv4 import Conv4
from raywgen.weights import Layout


@pytest.fixture(scope="module")
def config() -> FewShotConfig:
    quick = ReptileConfig(
        num_meta_steps=2,
        meta_batch=2,
        train_shots=4,
        head_learning_rate=0.03,
        symmetric_head=True,
        augment="shift-1",
    )
    return FewShotConfig(
        data="digits", group="", way=2, shot=5, num_query=10, num_episodes=4, num_validation=2, reptile=quick
    )


@pytest.fixture(scope="module")
def parts(config: FewShotConfig) -> Parts:
    torch.manual_seed(0)
    module = Conv4(width=16)
    for _ in range(5):
        module(torch.randn(32, 1, 28, 28))
    encoder, network = FrozenEncoder(module, name="drawn", identity=""), Conv4(num_classes=2)
    layout = Layout.from_state_dict(OrderedDict(weight=torch.zeros(2, 16), bias=torch.zeros(2)))
    return Parts(
        seed=0,
        encoder=encoder,
        encoder_accuracy=0.0,
        corpus=Corpus.__new__(Corpus),
        generators={},
        layout=layout,
        reptile=ReptileState.of(network),
        network=network,
        validation=few_shot_parts.validation_side(config, encoder, 0),
        test=few_shot_parts.test_side(config, encoder, 0, TaskSource()),
    )


def test_a_network_from_scratch_learns_digits(config: FewShotConfig, parts: Parts) -> None:
    row = from_scratch(config, parts)
    assert row.num_steps in (5, 10, 20, 50)
    assert row.accuracy(parts.test, 4).mean() > 0.75
    _starts_anew(row, parts)


def test_the_head_of_reptile_learns_on_features(config: FewShotConfig, parts: Parts) -> None:
    row = reptile_head(config, parts, TaskSource(domains=("plain", "plain")))
    assert {name: tuple(value.shape) for name, value in row.start.weights.items()} == {
        "head.weight": (2, 16),
        "head.bias": (2,),
    }
    # Classes are numbered at random, so that no class may be ahead at the start.
    assert torch.equal(row.start.weights["head.weight"][0], row.start.weights["head.weight"][1])
    assert row.accuracy(parts.test, 4).mean() > 0.7
    untrained = replace(row, num_steps=0)
    assert untrained.accuracy(parts.test, 4).mean() == 0.5
    _starts_anew(row, parts)


def _starts_anew(row: Adaptation, parts: Parts) -> None:
    before = {name: value.clone() for name, value in row.start.weights.items()}
    row.call(parts.test)()
    assert all(torch.equal(value, before[name]) for name, value in row.start.weights.items())
