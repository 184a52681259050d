"""Plans of runs: for corpora that are there and for those to come, for nodes that fit and for those that do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raywgen.config import ConfigError, load_config
from raywgen.corpus import Corpus, CorpusError
from raywgen.training import load_train_config
from raywgen.training.plan import Plan, PlanConfig, make_plan, split_overrides
from raywgen.training.plan.config import num_bytes
from raywgen.training.plan.hours import StageSeconds, run_seconds, stage_seconds
from raywgen.training.plan.nodes import PlannedNode, PlannedNodes

pytestmark = pytest.mark.usefixtures("one_thread")
GIB = 1 << 30
PRIOR = [
    "generator.tokenizer.quantiser={num_levels: 2, num_codes: 16}",
    "generator.prior={width: 64, num_layers: 2, num_heads: 2, window: 64}",
    "generator.task_loss.num_steps=0",
]
NODES = ["nodes=2", "cpus=4", "memory=8GiB"]


def planned(*overrides: str, name: str = "igpg") -> Plan:
    own, of_run = split_overrides(overrides)
    return make_plan(load_train_config(name, of_run), load_config(PlanConfig, None, own))


def test_a_corpus_that_is_there_needs_no_assumptions(zoo_corpus: Corpus) -> None:
    made = planned(f"corpus={zoo_corpus.location}", *PRIOR, *NODES)
    assert not made.refusals
    assert made.corpus.num_networks == zoo_corpus.facts.num_rows
    assert made.corpus.num_bytes == sum(shard.num_bytes for shard in zoo_corpus.shards)
    generator = load_train_config("igpg", PRIOR)
    assert [stage.shape.num_steps for stage in made.stages] == [
        generator.generator.tokenizer.num_steps,  # pyright: ignore[reportAttributeAccessIssue]
        generator.generator.prior.num_steps,  # pyright: ignore[reportAttributeAccessIssue]
    ]
    prior = made.stages[1]
    P = prior.shape.sizes.num_parameters
    assert prior.bytes.gradients == 4 * P
    assert prior.bytes.optimizer == 12 * P // 2  # ZeRO-1 over two workers.
    assert made.hours is None
    as_json = json.loads(json.dumps(made.to_json()))
    assert as_json["fits"]
    assert as_json["tokens_of_largest"]["num_levels"] == 2
    assert list(made.assumptions()) == ["Steps are those of the largest of 2 architectures."]


def test_the_manifest_alone_is_enough(zoo_corpus: Corpus, tmp_path: Path) -> None:
    shutil.copy(Path(zoo_corpus.location) / "manifest.json", tmp_path)
    made, whole = (planned(f"corpus={path}", *PRIOR, *NODES) for path in (tmp_path, zoo_corpus.location))
    assert made.corpus.num_networks == whole.corpus.num_networks
    assert made.corpus.largest.id == whole.corpus.largest.id
    assert any(sentence.startswith("Only the manifest") for sentence in made.assumptions())


def test_a_corpus_to_come_is_told_by_its_architecture() -> None:
    made = planned("layout={name: mlp, widths: [64, 200, 2]}", "num_networks=1000", "num_features=64", *PRIOR, *NODES)
    assert made.corpus.largest.num_values == 64 * 200 + 200 + 200 * 2 + 2
    assert made.corpus.num_bytes == 1000 * 4 * made.corpus.largest.num_values
    with pytest.raises(CorpusError, match="to plan without it, give layout=NAME"):
        planned("corpus=/no/where", *NODES)


@pytest.mark.parametrize("name", [pytest.param("igpg/vit-l", marks=pytest.mark.slow), "mcdi/vit-l"])
def test_shipped_configs_of_large_networks_are_planned_without_their_memory(name: str) -> None:
    gpus = ["layout=resnet101", "nodes=4", "gpus_per_node=8", "memory=512GiB"]
    path = str(Path(__file__).parents[3] / "configs" / f"{name}.yaml")
    made = planned(*gpus, "gpu_memory=80GiB", name=path)
    assert not made.refusals
    assert made.generator.num_parameters > 10**8
    assert all(not stage.shape.guess for stage in made.stages)


def test_what_cannot_fit_names_the_nearest_settings_that_do() -> None:
    run = ["layout=[64, 4000, 2000, 2]", "num_features=64", "method=direct", "generator.task_loss.num_steps=0"]
    run += ["generator.network={kind: chunks, window: 0, width: 64}", "generator.regression.batch_size=64"]
    nodes = ["nodes=4", "cpus=9", "memory=32GiB", "num_workers=8", "zero_stage=0"]
    made = planned(*run, *nodes, name="direct")
    (refusal,) = made.refusals
    assert refusal.startswith("stage 'regression' takes ")
    settings = refusal.rpartition("; ")[2].removesuffix(" fits").split()
    assert not planned(*run, *nodes[:3], *settings, name="direct").refusals
    assert any(setting.startswith("accumulate=") and setting != "accumulate=1" for setting in settings)
    made = planned(*run, "nodes=1", "cpus=2", "memory=1GiB", "num_workers=1", name="direct")
    assert (
        "no number of workers and parts fits: give a smaller generator, smaller networks, as this" in made.refusals[0]
    )


def test_workers_that_no_node_has_room_for_are_refused() -> None:
    made = planned("layout=[64, 20, 2]", *PRIOR, *NODES, "num_workers=8")
    assert made.refusals == [
        "num_workers=8 is more than the CPUs, one of which reads the corpus, of 2 nodes of 4 CPU, 8 GiB each given by "
        "hand: give num_workers=7, or more nodes"
    ]
    # Readers of Ray Data reserve no CPU.
    assert not planned("layout=[64, 20, 2]", *PRIOR, *NODES, "num_workers=8", "source=ray").refusals
    (refusal,) = planned("layout=[64, 20, 2]", *PRIOR, *NODES, "num_workers=9", "source=ray").refusals
    assert refusal.startswith("num_workers=9 is more than the CPUs of 2 nodes of 4 CPU, 8 GiB each given by hand: ")


def test_auto_chooses_as_workers_would() -> None:
    made = planned("layout=[64, 20, 2]", *PRIOR, *NODES, "strategy=auto")
    assert made.stages[1].choice.zero_stage == 0
    assert "parameters take" in made.stages[1].reason


def test_hours_follow_from_steps_and_their_price_from_nodes() -> None:
    steps = ["generator.tokenizer.num_steps=100", "generator.prior.num_steps=200", "validate_every=50"]
    run = ["layout=[64, 20, 2]", *PRIOR, *NODES, *steps]
    made = planned(*run, "seconds_per_step={tokenizer: 36, prior: 72}", "price_per_node_hour=2", "num_workers=5")
    assert made.hours is not None
    assert made.hours.hours == pytest.approx(1 + 4)
    assert (made.hours.node_hours, made.hours.price) == (10, 20)
    with pytest.raises(ConfigError, match="give those of stage 'prior' too"):
        planned(*run, "seconds_per_step={tokenizer: 36}")
    config = load_train_config("igpg", [*PRIOR, *steps])
    seconds = {"prior": StageSeconds(step=1.0, setup=5.0, validation=10.0)}
    assert run_seconds(config, seconds) == 5 + 200 + 5 * 10


def test_the_rows_of_a_short_run_tell_what_takes_time() -> None:
    def rows(stage: str, begin: float) -> list[dict[str, Any]]:
        times = [begin + at for at in (13.0, 15.0, 16.0, 17.0, 18.0, 22.0)]
        return [{"stage": stage, "step": step, "time": time} for step, time in enumerate(times)]

    seconds = StageSeconds(step=1.0, setup=9.0, validation=3.0)
    assert stage_seconds([*rows("a", 0.0), *rows("b", 22.0)]) == {"a": seconds, "b": seconds}


@pytest.mark.slow
def test_a_step_is_measured_in_a_process_of_its_own(zoo_corpus: Corpus) -> None:
    small = ["generator.tokenizer={num_steps: 1000, batch_size: 4}", "generator.prior={num_steps: 1000, batch_size: 4}"]
    run = [f"corpus={zoo_corpus.location}", *PRIOR, *small, "num_workers=0"]
    made = planned(*run, "measure=true", "measured_steps=6")
    assert made.hours is not None
    assert made.hours.is_measured
    assert all(each.step > 0 for each in made.hours.seconds.values())
    assert 0 < made.hours.hours < 1
    assert made.hours.values_per_second is not None
    assert made.hours.values_per_second > 0


def test_amounts_of_memory() -> None:
    assert [num_bytes(text) for text in ("", "80GiB", "1.5 TB", "512 mib", "7")] == [
        0,
        80 * GIB,
        15 * 10**11,
        1 << 29,
        7,
    ]
    for wrong in ("80 gallons", "GiB", "1e3"):
        with pytest.raises(ValueError, match="is no amount of memory; give one such as 80GiB"):
            num_bytes(wrong)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpus_per_node": 8, "nodes": 1}, "give gpu_memory too"),
        ({"memory": "8GiB"}, "give nodes too"),
        ({"seconds_per_step": "fast"}, "seconds above 0"),
        ({"measured_steps": 5}, "at least 6"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PlanConfig(**given)


def test_workers_on_nodes() -> None:
    gpus = PlannedNode(cpus=8, gpus=4, gpu_memory=80 * GIB, memory=256 * GIB)
    nodes = PlannedNodes(nodes=[gpus, replace(gpus, gpus=2, gpu_memory=16 * GIB)], source="given by hand")
    assert (nodes.num_slots("cuda", 1), nodes.num_slots("cpu", 1), nodes.num_slots("cpu", 0)) == (6, 15, 16)
    assert (nodes.device_memory("cuda", 4), nodes.device_memory("cuda", 5)) == (80 * GIB, 16 * GIB)
    assert nodes.device_memory("cpu", 4) == 128 * GIB
    assert (nodes.num_used("cuda", 4), nodes.num_used("cuda", 5), nodes.num_used("cpu", 9)) == (1, 2, 2)
    assert nodes.describe().startswith("2 nodes of 8 CPU, 256 GiB, 4 GPU of 80 GiB each (the first one's)")


def test_batches_lie_in_the_object_store_where_readers_fetch_them() -> None:
    run = ["layout=[64, 20, 2]", "num_features=64", *NODES, "num_workers=2", "generator.task_loss.num_steps=1"]
    mapped = planned(*run, name="hypernetwork")
    assert mapped.object_bytes == 0
    assert planned(*run, "source=ray", name="hypernetwork").object_bytes == 2 * 64 << 20
    assert planned(*run, "corpus=s3://bucket/zoo", name="hypernetwork").object_bytes == 2 * 64 << 20
