"""Architectures that no corpus held: what is a failure, and what the benchmark compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from raywgen.benchmarks.run import run
from raywgen.benchmarks.unseen_architectures import UnseenArchitecturesConfig, _check_tasks, _figures
from raywgen.config import SHIPPED, load_config
from raywgen.corpus import Corpus
from raywgen.tasks import build_network
from raywgen.tasks.networks import network_recipe
from raywgen.weights import Layout
from raywgen.zoo import ZooConfig

ROWS = ("units", "shuffled", "hypernetwork", "nearest", "gradient", "poor")


def test_the_corpus_of_starts_holds_none_of_the_architectures() -> None:
    zoo = load_config(ZooConfig, SHIPPED / "zoo" / "digits-architectures.yaml")
    config = UnseenArchitecturesConfig()
    known, asked = (
        {Layout.from_state_dict(build_network(network_recipe(one)).state_dict()).id for one in networks}
        for networks in (zoo.networks, config.architectures)
    )
    assert len(known) == len(zoo.networks) == 112
    assert len(asked) == len(config.architectures) == 36
    assert not known & asked
    assert (zoo.num_steps, zoo.checkpoint_steps) == (1, [0])


def test_figures_are_means_and_worsts_and_shares_of_networks() -> None:
    ratios = {
        "mlp-64-13-2-True": dict.fromkeys(ROWS, 0.9) | {"units": 1.0},
        "mlp-64-13-2-False": dict.fromkeys(ROWS, 0.8) | {"units": 0.7},
        "cnn-7-num_classes_2": dict.fromkeys(ROWS, 0.5) | {"units": 0.4},
    }
    # Three of four that collapsed were warned of, and one of five that did not.
    collapses = [(True, True)] * 3 + [(True, False)] + [(False, True)] + [(False, False)] * 4
    figures = _figures(ratios, torch.tensor(collapses))
    assert figures["mean_ratio"] == pytest.approx(0.7)
    assert figures["worst_ratio"] == 0.4
    assert (figures["mlp_mean_ratio"], figures["mlp_worst_ratio"]) == (pytest.approx(0.85), 0.7)
    assert (figures["no_bias_mean_ratio"], figures["cnn_mean_ratio"]) == (0.7, 0.4)
    assert figures["gradient_mean_ratio"] == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    assert (figures["collapse_recall"], figures["false_alarms"]) == (0.75, pytest.approx(0.2))


@pytest.mark.parametrize("wrong", [{"best_of": 0}, {"architectures": []}, {"poor_share": 1.0}])
def test_wrong_settings_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        UnseenArchitecturesConfig(**wrong)  # pyright: ignore[reportArgumentType]


def test_a_zoo_that_was_trained_on_what_the_other_holds_out_is_refused(zoo_corpus: Corpus) -> None:
    _check_tasks(zoo_corpus, zoo_corpus)
    other = {key: replace(task, split="seen") for key, task in zoo_corpus.tasks.items()}
    with pytest.raises(ValueError, match=r"trained_zoo is trained on digits/.*the same numbers of tasks"):
        _check_tasks(zoo_corpus, SimpleNamespace(tasks=other))  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_the_benchmark_on_two_architectures(tmp_path: Path) -> None:
    few = "num_seen_tasks=6,num_validation_tasks=2,num_unseen_tasks=3"
    settings = [
        "architectures=[[64,13,2],{name: cnn, channels: [7], num_classes: 2}]",
        f'zoo=[{few},"networks=[[64,6,2],[64,5,4,2]]"]',
        f'trained_zoo=[{few},num_steps=20,"checkpoint_steps=[20]","networks=[[64,6,2]]"]',
        "units=[task_loss.num_steps=5,width=16]",
        "rates=[0.01]",
        "steps=[10]",
        "best_of=2",
        "distributed=false",
        f"out={tmp_path}",
    ]
    result = run(["unseen-architectures", *settings])
    figures, (ratios,) = result["figures"], result["conditions"]["ratios"].values()
    assert set(ratios) == {"mlp-64-13-2", "cnn-7-num_classes_2"}
    assert all(set(row) == set(ROWS) and all(0 < value < 1.2 for value in row.values()) for row in ratios.values())
    # Ten steps on 64 samples teach more than five steps of a generator, and those more than nothing.
    assert figures["gradient_mean_ratio"] > figures["mean_ratio"] > figures["hypernetwork_mean_ratio"]
    assert figures["failed_seeds"] == (figures["worst_ratio"] < 0.8)
    assert figures["collapse_recall"] > 0.5
