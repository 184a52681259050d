from __future__ import annotations

import itertools

import pytest

from raywgen.config import ConfigError
from raywgen.training import TrainConfig
from raywgen.training.resource_check import Nodes
from raywgen.tuning.resources import Node, check_resources, nodes_to_come, trials_at_once

CLUSTERS = [
    [Node(cpus=cpus, gpus=gpus) for cpus, gpus in sizes]
    for sizes in [[(1, 0)], [(2, 0)], [(5, 0)], [(1, 0), (4, 0)], [(3, 1), (0, 0)], [(4, 4)], [(1, 2), (3, 0), (2, 2)]]
]


def all_train(nodes: list[Node], num_trials: int, num_workers: int, use_gpu: bool) -> bool:
    """Whether, wherever the trials themselves stand, all workers find a place and a CPU is left to feed each trial."""
    seats = [index for index, node in enumerate(nodes) for _ in range(node.cpus)]
    if num_trials > len(seats):
        return False
    for taken in set(itertools.combinations(seats, num_trials)):
        free = [node.cpus - taken.count(index) for index, node in enumerate(nodes)]
        if num_workers == 0:
            continue
        wanted = num_trials * num_workers
        places = sum(node.gpus for node in nodes) if use_gpu else sum(free)
        left = sum(free) - (0 if use_gpu else wanted)
        if places < wanted or left < num_trials:
            return False
    return True


@pytest.mark.parametrize("nodes", CLUSTERS, ids=str)
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("use_gpu", [False, True])
def test_as_many_as_can_all_train_and_no_more(nodes: list[Node], num_workers: int, use_gpu: bool) -> None:
    fit = trials_at_once(nodes, num_workers, use_gpu)
    assert fit == 0 or all_train(nodes, fit, num_workers, use_gpu)
    assert not all_train(nodes, fit + 1, num_workers, use_gpu)


def train(**changes: int | str | list[int]) -> TrainConfig:
    return TrainConfig(**changes)  # pyright: ignore[reportArgumentType]


def test_what_no_cluster_has_is_one_line_that_names_the_key() -> None:
    nodes = [Node(cpus=2), Node(cpus=1)]
    with pytest.raises(ConfigError) as caught:
        check_resources(nodes, train(num_workers=8), 0)
    message = str(caught.value)
    assert "a trial of train.num_workers=8 needs 10 CPUs" in message
    assert "this cluster has 3 CPUs and 0 GPUs on 2 nodes; set a lower train.num_workers" in message
    with pytest.raises(ConfigError, match=r"train.num_workers=\[1, 8\] needs 10 CPUs"):
        check_resources(nodes, train(num_workers=[1, 8]), 0)
    with pytest.raises(ConfigError, match=r"needs 2 CPUs and 1 GPUs.*set train.device=cpu"):
        check_resources(nodes, train(num_workers=1, device="cuda"), 0)
    with pytest.raises(ConfigError, match=r"max_concurrent=2: .* at most 1 at once"):
        check_resources(nodes, train(num_workers=1), 2)


def test_as_many_as_fit_is_the_default() -> None:
    assert check_resources([Node(cpus=7)], train(num_workers=0), 0) == 7
    assert check_resources([Node(cpus=7)], train(num_workers=1), 0) == 2
    assert check_resources([Node(cpus=7)], train(num_workers=1), 1) == 1


def test_what_an_autoscaler_may_add_counts() -> None:
    alive = [{"CPU": 2.0}]
    grown = nodes_to_come(train(num_workers=2), Nodes(alive=alive, most=[*alive, {"CPU": 8.0}]))
    assert check_resources(grown, train(num_workers=2), 0) == 2
    with pytest.raises(ConfigError, match="this cluster has 2 CPUs"):
        check_resources(nodes_to_come(train(num_workers=2), Nodes(alive=alive, most=alive)), train(num_workers=2), 0)


@pytest.mark.parametrize("use_gpu", [False, True])
def test_where_nobody_knows_what_may_be_added_one_trial_begins(use_gpu: bool) -> None:
    config = train(num_workers=3, device="cuda" if use_gpu else "cpu")
    assert check_resources(nodes_to_come(config, Nodes(alive=[{"CPU": 1.0}], most=None)), config, 0) == 1
    large = Nodes(alive=[{"CPU": 10.0, "GPU": 6.0}], most=None)
    assert check_resources(nodes_to_come(config, large), config, 0) == 2
