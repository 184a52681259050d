from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raywgen.config import ConfigError, load_config
from raywgen.tasks import TaskError, build_task
from raywgen.tasks.networks.text_models import causal_digest, encoder_digest
from raywgen.zoo import ZooConfig
from raywgen.zoo.config import TaskKind, ZooExecution, ZooOptimizer, ZooTasks
from raywgen.zoo.draw import draw_tasks, network_recipes
from raywgen.zoo.execution import ExecutionTimes, choose_executions
from raywgen.zoo.plan import plan_zoo
from tests.conftest import make_zoo
from tests.text_encoders import SIGNS, make_decoder, make_encoder, make_sentences

COUNTS: dict[str, Any] = {"num_seen_tasks": 5, "num_validation_tasks": 2, "num_unseen_tasks": 3}
MLP = [{"name": "mlp", "widths": [64, 8, 10]}]


def zoo(kind: TaskKind, **settings: Any) -> ZooConfig:
    return ZooConfig(tasks=ZooTasks(kind=kind, **settings), networks=MLP, **COUNTS)


def test_class_subsets_are_split_whole() -> None:
    drawn = draw_tasks(zoo("class-subsets", subset_size=4))
    assert {split: len(recipes) for split, recipes in drawn.items()} == {"seen": 5, "validation": 2, "unseen": 3}
    subsets = [tuple(recipe["classes"]) for recipes in drawn.values() for recipe in recipes]
    assert len(set(subsets)) == 10
    assert {len(subset) for subset in subsets} == {4}
    with pytest.raises(TaskError, match="there are 10 sets of 9 of 10 classes"):
        draw_tasks(dataclasses.replace(zoo("class-subsets", subset_size=9), num_seen_tasks=9))


def test_episodes_of_unseen_tasks_are_of_other_classes() -> None:
    drawn = draw_tasks(zoo("episodes", way=2, shot=3))
    assert {recipe["split"] for recipe in drawn["unseen"]} == {"test"}
    assert len({build_task(recipe).id for recipes in drawn.values() for recipe in recipes}) == 10


def test_the_last_domain_is_unseen() -> None:
    drawn = draw_tasks(zoo("domains", domains=["plain", "invert", "rotate-30"]))
    assert [recipe["domain"] for recipe in drawn["seen"]] == ["plain", "invert"]
    assert [recipe["domain"] for recipe in drawn["unseen"]] == ["rotate-30"]
    drawn = draw_tasks(zoo("domains", domains=["plain", "other.parquet::invert"]))
    assert drawn["unseen"][0]["path"].endswith("/other.parquet")
    assert drawn["unseen"][0]["domain"] == "invert"
    drawn = draw_tasks(
        zoo("domains", domains=["plain", "invert", "a.parquet::plain", "b.parquet::plain"], num_unseen_domains=2)
    )
    assert [recipe["domain"] for recipe in drawn["seen"]] == ["plain", "invert"]
    assert [recipe["path"].rpartition("/")[2] for recipe in drawn["unseen"]] == ["a.parquet", "b.parquet"]
    with pytest.raises(TaskError, match="a domain is named twice"):
        draw_tasks(zoo("domains", domains=["plain", "plain"]))


def test_episodes_take_turns_in_domains_and_unseen_ones_see_the_last() -> None:
    domains = ["plain", "invert", "other.parquet::plain", "scale-0.5"]
    drawn = draw_tasks(zoo("episodes", way=2, shot=3, group="writer", domains=domains))
    assert [recipe["domain"] for recipe in drawn["seen"]] == ["plain", "invert", "plain", "plain", "invert"]
    assert [recipe["split"] for recipe in drawn["seen"]] == ["train", "train", "all", "train", "train"]
    assert [recipe["group"] for recipe in drawn["seen"]] == ["writer", "writer", "", "writer", "writer"]
    assert drawn["seen"][2]["path"].endswith("/other.parquet")
    assert [recipe["domain"] for recipe in drawn["validation"]] == ["plain", "invert"]
    mixed = draw_tasks(zoo("episodes", way=2, shot=3, domains=["plain", "a.parquet::plain", "b.parquet::plain"]))
    assert [recipe["split"] for recipe in mixed["seen"]] == ["train", "all", "train", "all", "train"]
    assert [recipe["split"] for recipe in mixed["validation"]] == ["validation", "validation"]
    assert {(recipe["split"], recipe["domain"]) for recipe in drawn["unseen"]} == {("test", "scale-0.5")}
    with pytest.raises(ValueError, match="give at least two"):
        zoo("episodes", domains=["plain"])


def test_all_classes_are_one_task_with_an_absolute_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (recipe,) = draw_tasks(zoo("images", path="here.parquet"))["seen"]
    assert recipe["path"] == str(tmp_path / "here.parquet")
    (recipe,) = draw_tasks(zoo("images"))["seen"]
    assert recipe["path"] == "digits"


def test_sentences_train_a_zoo(tmp_path: Path) -> None:
    path = tmp_path / "films.parquet"
    sentences = [f"a {'good' if i % 2 else 'bad'} film" for i in range(60)]
    pq.write_table(pa.table({"sentence": sentences, "label": [i % 2 for i in range(60)]}), path)
    config = ZooConfig(
        tasks=ZooTasks(kind="texts", path=str(path), num_features=32),
        networks=[{"name": "mlp", "widths": [32, 2]}],
        num_steps=60,
        checkpoint_steps=[60],
        learning_rate=0.05,
        start="own",
    )
    corpus = make_zoo(config, tmp_path / "c")
    assert corpus.facts.column("test_accuracy").to_pylist() == [1.0] * 4


def test_a_network_that_does_not_fit_is_refused_before_training() -> None:
    config = dataclasses.replace(zoo("images"), networks=[{"name": "mlp", "widths": [63, 10]}])
    with pytest.raises(TaskError, match="does not take samples of 64 values"):
        plan_zoo(config)
    config = dataclasses.replace(zoo("images"), networks=[{"name": "mlp", "widths": [64, 9]}])
    with pytest.raises(TaskError, match="10 classes; give num_classes, or another width"):
        plan_zoo(config)


def test_wrong_settings_are_named() -> None:
    for build, message in (
        (lambda: ZooTasks(kind="domains", domains=["plain"]), "give at least two"),
        (lambda: ZooTasks(kind="domains", domains=["plain", "invert"], num_unseen_domains=2), "give 1 to 1"),
        (lambda: ZooConfig(start="branched"), "give both or neither"),
        (lambda: ZooConfig(optimizers=[ZooOptimizer(), ZooOptimizer()]), "adam, adam are not all different"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.kind=videos", "tasks.kind=videos: give one of"),
        ("start=warm", "start=warm: give one of shared, own, branched"),
        ("execution=fast", "execution=fast"),
        ("optimizers=[{optimizer: lion}]", "optimizer=lion"),
    ],
)
def test_wrong_choices_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ZooConfig, None, [override])


def test_overrides_reach_every_nested_setting() -> None:
    config = load_config(
        ZooConfig,
        None,
        [
            "tasks.kind=images",
            "networks=[{name: mlp, widths: [64, 4, 10]}, tiny-cnn]",
            "optimizers=[{optimizer: sgd, learning_rate: 0.1, sam: {rho: 0.05, adaptive: true}}]",
        ],
    )
    assert config.network_recipes() == [{"name": "mlp", "widths": [64, 4, 10]}, {"name": "tiny-cnn"}]
    assert [one.label for one in config.fits()] == ["sgd-m0.9-asam0.05"]


def test_an_execution_is_chosen_by_measurement_and_reported() -> None:
    sentences: list[str] = []
    executions = choose_executions(zoo("images"), sentences.append)
    assert executions.keys() == {"mlp-64-8-10"}
    assert set(executions.values()) <= {"stacked", "sequential"}
    assert sentences[0].startswith("mlp-64-8-10: ")
    assert "CPU time a network and step: stack" in sentences[0]


def test_the_execution_is_that_of_the_median_pair() -> None:
    """One pair that was interrupted, and a machine that slows down midway, change nothing."""
    assert ExecutionTimes(stacked=(1.0, 1.0, 9.0), sequential=(2.0, 2.0, 2.0)).faster == "stacked"
    assert ExecutionTimes(stacked=(1.0, 4.0, 4.0), sequential=(0.9, 3.6, 3.6)).faster == "sequential"
    assert ExecutionTimes(stacked=(1.0, 4.0, 4.0), sequential=(0.9, 3.6, 3.6)).ratio == pytest.approx(0.9)


@pytest.mark.parametrize(
    "tasks",
    [
        ZooTasks(kind="class-subsets", subset_size=3),
        ZooTasks(kind="episodes", way=2, shot=5),
        ZooTasks(kind="domains", domains=["plain", "invert"]),
    ],
    ids=lambda tasks: tasks.kind,
)
@pytest.mark.parametrize("execution", ["stacked", "sequential"])
def test_every_kind_of_task_trains_into_a_corpus(tasks: ZooTasks, execution: ZooExecution, tmp_path: Path) -> None:
    config = ZooConfig(
        tasks=tasks,
        networks=[{"name": "mlp", "widths": [64, 16, 10]}],
        num_seen_tasks=3,
        num_validation_tasks=1,
        num_unseen_tasks=1,
        seeds_per_task=2,
        num_steps=150,
        checkpoint_steps=[0, 150],
        execution=execution,
        stack_size=4,
        batch_size=10,
    )
    corpus = make_zoo(config, tmp_path / "c")
    rows = [row for row in corpus.facts.to_pylist() if row["split"] != "base"]
    start = [row["test_accuracy"] for row in rows if row["step"] == 0]
    end = [row["test_accuracy"] for row in rows if row["step"] == 150]
    assert len(start) == len(end) == 2 * len(corpus.tasks)
    assert sum(end) / len(end) > sum(start) / len(start) + 0.2
    windows = corpus.windows(batch_size=4, length=1, terms=["split!=base"])
    assert windows.num_items == len(end)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sentences")
    base = make_encoder(folder / "encoder")
    return {"path": make_sentences(folder / "signs.parquet"), "base": base, "class_names": SIGNS, "first_layer": 1}


def test_sentence_groups_recombine_classes_and_pin_the_encoder(sentences: dict[str, Any]) -> None:
    drawn = draw_tasks(zoo("sentence-groups", **sentences))
    assert {split: len(recipes) for split, recipes in drawn.items()} == {"seen": 5, "validation": 2, "unseen": 3}
    groups = [str(recipe["groups"]) for recipes in drawn.values() for recipe in recipes]
    assert len(set(groups)) == 10
    assert {recipe["digest"] for recipes in drawn.values() for recipe in recipes} == {encoder_digest(sentences["base"])}


def test_a_heldout_class_is_in_every_unseen_task_alone(sentences: dict[str, Any]) -> None:
    config = dataclasses.replace(zoo("sentence-groups", **sentences, heldout_classes=[2]), num_seen_tasks=4)
    drawn = draw_tasks(config)
    for split, recipes in drawn.items():
        for recipe in recipes:
            assert any(2 in group for group in recipe["groups"]) == (split == "unseen")
    with pytest.raises(TaskError, match="7 is none of the classes"):
        draw_tasks(zoo("sentence-groups", **sentences, heldout_classes=[7]))


def test_the_last_files_are_left_out_whole(sentences: dict[str, Any], tmp_path: Path) -> None:
    other = make_sentences(tmp_path / "others.parquet", num=60)
    given = sentences | {"paths": [sentences["path"], other], "num_unseen_paths": 1, "class_names": [*SIGNS, *SIGNS]}
    drawn = draw_tasks(zoo("sentence-groups", **given))
    assert {split: len(recipes) for split, recipes in drawn.items()} == {"seen": 5, "validation": 2, "unseen": 3}
    for split, recipes in drawn.items():
        for recipe in recipes:
            assert recipe["path"] == given["paths"]
            numbers = {number for group in recipe["groups"] for number in group}
            assert numbers <= (set(range(4, 8)) if split == "unseen" else set(range(4)))
    with pytest.raises(ValueError, match="give fewer than there are"):
        zoo("sentence-groups", **sentences, paths=[other], num_unseen_paths=1)


def test_tasks_on_words_are_drawn_from_the_sentences(sentences: dict[str, Any]) -> None:
    given = {name: value for name, value in sentences.items() if name != "class_names"}
    with pytest.raises(TaskError, match="half of which are about a word each"):
        draw_tasks(zoo("sentence-words", **given))


def test_the_base_of_an_adapter_is_pinned(sentences: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(sentences["base"]).parent)
    adapter = {"name": "lora", "base": {"name": "upper-layers", "path": "encoder"}, "rank": 2, "targets": ["query"]}
    config = dataclasses.replace(zoo("sentence-groups", **sentences), networks=[adapter])
    (recipe,) = network_recipes(config)
    assert recipe["base"]["path"] == sentences["base"]
    assert recipe["base"]["digest"] == encoder_digest(sentences["base"])


def test_domains_are_of_the_model_that_networks_adapt(sentences: dict[str, Any], tmp_path: Path) -> None:
    base = make_decoder(tmp_path / "decoder")
    given = {"path": sentences["path"], "base": base, "first_layer": 2}
    config = dataclasses.replace(
        zoo("domain-classes", **given),
        **{"num_seen_tasks": 2, "num_validation_tasks": 1, "num_unseen_tasks": 1},
        networks=[{"name": "lora", "base": {"name": "next-word"}, "rank": 2, "targets": ["v_proj"]}],
    )
    drawn = draw_tasks(config)
    recipes = [recipe for split in ("unseen", "validation", "seen") for recipe in drawn[split]]
    assert sorted(recipe["classes"][0] for recipe in recipes) == [0, 1, 2, 3]
    (network,) = network_recipes(config)
    pinned = {"path": base, "digest": causal_digest(base), "first_layer": 2}
    assert network["base"] == {"name": "next-word"} | pinned
    assert {recipe["digest"] for recipe in recipes} == {pinned["digest"]}
    with pytest.raises(TaskError, match="have 0 words for 1 domains"):
        draw_tasks(dataclasses.replace(config, tasks=ZooTasks(kind="domain-words", **given, limit=30)))
