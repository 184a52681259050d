from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from raywgen.ray_address import ClusterError
from raywgen.training import TrainConfig
from raywgen.training.resource_check import (
    GROUP_LABEL,
    Nodes,
    Resources,
    check_request,
    check_run,
    describe,
    first_unplaceable,
    most_nodes,
    read_group,
    worker_requests,
    write_group,
)


def fixed(*nodes: Resources) -> Nodes:
    return Nodes(alive=nodes, most=nodes)


def fits_somehow(requests: Sequence[Resources], nodes: Sequence[Resources]) -> bool:
    """By trying every way to place them."""
    names = sorted({name for request in requests for name in request})
    for places in itertools.product(range(len(nodes)), repeat=len(requests)):
        used = [dict.fromkeys(names, 0.0) for _ in nodes]
        for request, place in zip(requests, places, strict=True):
            for name, amount in request.items():
                used[place][name] += amount
        if all(used[i][name] <= node.get(name, 0.0) for i, node in enumerate(nodes) for name in names):
            return True
    return False


@pytest.mark.parametrize("use_gpu", [False, True])
def test_workers_fit_where_some_placing_of_them_does(use_gpu: bool) -> None:
    kinds = [{"CPU": 0.0}, {"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}, {"GPU": 2.0}]
    answers = []
    for nodes in itertools.combinations_with_replacement(kinds, 3):
        for num_workers in (1, 2, 3):
            requests = worker_requests(TrainConfig(num_workers=num_workers, device="cuda" if use_gpu else "cpu"))
            answers.append(first_unplaceable(requests, nodes) is None)
            assert answers[-1] == fits_somehow(requests, nodes), (nodes, num_workers)
    assert any(answers)
    assert not all(answers)


def test_a_range_of_workers_needs_room_for_its_fewest() -> None:
    nodes = fixed({"CPU": 2.0}, {"CPU": 1.0})
    check_run(TrainConfig(num_workers=[2, 8]), nodes)
    with pytest.raises(ClusterError, match=r"num_workers=\[3, 8\] asks for 3 x 1 CPU .* give num_workers=2, or add"):
        check_run(TrainConfig(num_workers=[3, 8]), nodes)


def test_the_refusal_names_the_number_that_fits() -> None:
    config = TrainConfig(num_workers=8)
    with pytest.raises(ClusterError) as refused:
        check_run(config, fixed({"CPU": 2.0}, {"CPU": 1.0}))
    assert str(refused.value) == (
        "num_workers=8 asks for 8 x 1 CPU and one more CPU to read the corpus, but the cluster has 3 CPU (at most 2 on "
        "one) on 2 nodes: give num_workers=2, or add nodes"
    )
    with pytest.raises(ClusterError, match="has 4 CPU on 1 node: num_workers=0 trains in one process"):
        check_run(TrainConfig(num_workers=1, device="cuda"), fixed({"CPU": 4.0}))
    check_run(TrainConfig(num_workers=2), fixed({"CPU": 2.0}, {"CPU": 1.0}))


@pytest.mark.parametrize("num_workers", [25, [25, 40]])
def test_readers_need_no_cpu_beside_the_workers(num_workers: int | list[int]) -> None:
    config = TrainConfig(num_workers=num_workers, source="ray")
    check_run(config, fixed({"CPU": 25.0}))
    with pytest.raises(ClusterError, match=r"asks for 25 x 1 CPU, but the cluster has 24 CPU .* give num_workers=24,"):
        check_run(config, fixed({"CPU": 24.0}))


def test_what_an_autoscaler_may_add_counts() -> None:
    labels = {f"{GROUP_LABEL}cpu": write_group(2, {"CPU": 4.0}), f"{GROUP_LABEL}gpu": write_group(1, {"GPU": 2.0})}
    alive = [({"CPU": 0.0}, labels), ({"CPU": 4.0}, {})]
    nodes = most_nodes(alive, lambda: pytest.fail("the labels say all"))
    check_run(TrainConfig(num_workers=7), nodes)
    check_run(TrainConfig(num_workers=2, device="cuda"), nodes)
    with pytest.raises(ClusterError, match="give num_workers=7"):
        check_run(TrainConfig(num_workers=8), nodes)
    with pytest.raises(ClusterError, match="a trial asks for 8 CPU on one node"):
        check_request({"CPU": 8.0}, "a trial", nodes)
    check_request({"CPU": 4.0}, "a trial", nodes)


def test_without_a_word_of_limits_nothing_is_refused_but_on_fixed_clusters() -> None:
    alive = [({"CPU": 1.0}, {})]
    eight = TrainConfig(num_workers=8)
    check_run(eight, most_nodes(alive, lambda: iter([None])))
    check_run(eight, most_nodes(alive, lambda: iter([{"ab12": "small.worker"}])))
    with pytest.raises(ClusterError):
        check_run(eight, most_nodes(alive, lambda: iter([None, {"ab12": "node_ab12"}])))


def test_groups_come_back_from_a_labels_letters() -> None:
    value = write_group(16, {"CPU": 8.0, "GPU": 1.0})
    assert value == "max-16_CPU-8_GPU-1"
    assert read_group(value) == (16, {"CPU": 8.0, "GPU": 1.0})


def test_words_for_clusters() -> None:
    assert describe([]) == "no node"
    assert describe([{"memory": 1e9}]) == "neither CPU nor GPU on 1 node"
    assert describe([{"CPU": 2.0, "GPU": 1.0}]) == "2 CPU and 1 GPU on 1 node"
