"""Work items run over a real Ray session: the same networks to the last bit, whoever dies on the way."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

from raywgen.corpus import Corpus, NetworkFacts
from raywgen.generation import ActorsLostError, NoResourcesError, generate
from raywgen.generation.executor import run_over_ray
from raywgen.generators.bundle import BundleError
from raywgen.tasks import build_network
from raywgen.weights import Layout
from tests.builders import condition
from tests.generation.test_generate import bundle, config
from tests.generation.test_sinks import SETTINGS, plan_of, request_of, same_weights, stopping_after, without_paths

__all__ = ["bundle"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:this generator was never"),
]


class Mortal(nn.Sequential):
    """Kills any process but the driver, which tries a network once before it is generated, where a file is not there.

    Makes the file first unless it is to kill for ever.
    """

    def __init__(self, mark: str, driver: int, is_deadly: bool = False) -> None:
        super().__init__(nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 2))
        self.mark, self.driver, self.is_deadly = Path(mark), driver, is_deadly

    def forward(self, input: Tensor) -> Tensor:
        if os.getpid() != self.driver and not self.mark.exists():
            if not self.is_deadly:
                self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(input)


class Logged(nn.Sequential):
    """Writes a line whenever it is run."""

    def __init__(self, log: str) -> None:
        super().__init__(nn.Linear(64, 2))
        self.log = log

    def forward(self, input: Tensor) -> Tensor:
        with Path(self.log).open("a") as file:
            file.write("run\n")
        return super().forward(input)


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(("into", "num_actors"), [("files", 2), ("corpus", 1)])
def test_actors_write_what_one_process_writes(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path, into: str, num_actors: int
) -> None:
    here = config(zoo_corpus, bundle, tmp_path / "here", into=into, **SETTINGS)
    progress: list[tuple[int, int]] = []
    there = dataclasses.replace(here, where="ray", num_actors=num_actors, out=str(tmp_path / "ray"))
    assert without_paths(generate(there, lambda *step: progress.append(step))) == without_paths(generate(here))
    assert same_weights(tmp_path / "ray", tmp_path / "here")
    assert progress[-1] == (20, 20)
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})


def test_what_a_dead_actor_was_given_is_written_again(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    mortal = {"name": "tests.generation.test_executor:Mortal", "mark": str(tmp_path / "mark"), "driver": os.getpid()}
    settings = config(zoo_corpus, bundle, tmp_path / "ray", networks=[mortal], where="ray", num_actors=2, **SETTINGS)
    rows = generate(settings)
    assert (tmp_path / "mark").exists(), "an actor must have died"
    here = generate(dataclasses.replace(settings, where="here", out=str(tmp_path / "here")))
    assert without_paths(rows) == without_paths(here)
    assert same_weights(tmp_path / "ray", tmp_path / "here")


def test_an_item_that_kills_every_actor_is_given_up(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    deadly = {
        "name": "tests.generation.test_executor:Mortal",
        "mark": str(tmp_path / "mark"),
        "driver": os.getpid(),
        "is_deadly": True,
    }
    settings = config(zoo_corpus, bundle, tmp_path / "out", networks=[deadly], where="ray", num_actors=1, limit=1)
    with pytest.raises(ActorsLostError, match=r"work item 0 was given up: each of its 4 workers.*lower batch_size"):
        generate(settings)


def test_an_interrupted_run_goes_on_elsewhere(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    here = config(zoo_corpus, bundle, tmp_path / "here", into="corpus", **SETTINGS)
    whole = generate(here)
    there = dataclasses.replace(here, where="ray", num_actors=2, out=str(tmp_path / "ray"))
    with pytest.raises(KeyboardInterrupt):
        generate(there, stopping_after(10))
    progress: list[tuple[int, int]] = []
    assert generate(dataclasses.replace(there, where="here"), lambda *step: progress.append(step)) == whole
    assert progress[0][0] >= 10
    assert same_weights(tmp_path / "ray", tmp_path / "here")


def test_a_bounded_number_of_items_is_under_way(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    recipe = {"name": "tests.generation.test_executor:Logged", "log": str(tmp_path / "log")}
    network = NetworkFacts(
        name="logged", recipe=recipe, layout=Layout.from_state_dict(build_network(recipe).state_dict())
    )
    tasks = [dataclasses.replace(next(iter(zoo_corpus.tasks.values())), recipe={})]
    given = dataclasses.replace(condition(1), samples_BSF=tasks[0].samples_SF[None], labels_BS=tasks[0].labels_S[None])
    request = request_of(zoo_corpus, networks=[network], tasks=tasks, condition=given, best_of=1)
    plan = plan_of(request, num=12, batch_size=1, generator=bundle)
    results = run_over_ray(plan, plan.items, 1, 60.0)
    first = next(results)
    time.sleep(2)  # Far longer than the other eleven would take.
    num_run = len((tmp_path / "log").read_text().splitlines())
    assert 1 <= num_run <= 2, "the one that was taken, and the one that waited behind it"
    assert sorted(each.item.index for each in (first, *results)) == list(range(12))


def test_a_full_cluster_is_named(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    settings = config(zoo_corpus, bundle, tmp_path, where="ray", threads=64, start_timeout=1.0)
    with pytest.raises(NoResourcesError, match=r"needs 64 CPUs of one node, the cluster has 2.*where=here"):
        generate(settings)


def test_more_actors_than_there_is_room_for_do_not_stop_the_others(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path
) -> None:
    rows = generate(config(zoo_corpus, bundle, tmp_path, where="ray", num_actors=20, **SETTINGS))
    assert len(rows) == 20


def test_what_is_wrong_on_a_node_reaches_the_user_as_it_is(zoo_corpus: Corpus, tmp_path: Path) -> None:
    plan = plan_of(request_of(zoo_corpus), generator=str(tmp_path))
    with pytest.raises(BundleError, match="where every node reaches it"):
        next(run_over_ray(plan, plan.items, 1, 60.0))
