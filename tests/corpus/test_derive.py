from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raywgen.corpus import (
    Corpus,
    CorpusError,
    DamagedFileError,
    NetworkFacts,
    UnknownFactError,
    commit_corpus,
    verify_corpus,
)
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.derive import Selection, dedupe, split, write_corpus
from raywgen.corpus.describe import describe
from raywgen.corpus.facts import TaskFacts
from raywgen.corpus.merge import merge
from raywgen.corpus.near_duplicates import networks_apart
from raywgen.weights import Layout, StateDict
from tests.corpus import builders
from tests.corpus.builders import assert_same_bits, network
from tests.networks_held import NetworksHeld


def make(root: Path, name: str, states: dict[str, StateDict], rows: list[dict[str, Any]] | None = None) -> Corpus:
    folder = root / f"{name}-files"
    for checkpoint, state in states.items():
        path = folder / f"{checkpoint}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path)
    facts = root / f"{name}.json"
    facts.write_text(json.dumps(rows or []))
    config = BuildConfig(out=str(root / name), sources=[str(folder)], facts=str(facts), distributed=False)
    return build_corpus(config)


def runs(num: int, first_seed: int = 0) -> dict[str, StateDict]:
    """Three checkpoints a run, of two layouts."""
    return {
        f"run-{run}/{step}": network(2 + run % 2, first_seed + 10 * run + step)
        for run in range(num)
        for step in range(3)
    }


def table_rows(num: int) -> list[dict[str, Any]]:
    return [
        {"path": f"run-{run}/*", "trajectory_id": f"run-{run}", "start_seed": run, "group": f"g{run % 2}", "depth": run}
        for run in range(num)
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make(tmp_path_factory.mktemp("source"), "source", runs(10), table_rows(10))


def facts_of(corpus: Corpus) -> dict[str, dict[str, Any]]:
    return {row["checkpoint_id"]: row for row in corpus.facts.to_pylist()}


def assert_copied(derived: Corpus, source: Corpus, ids: list[str]) -> None:
    """The same weights and facts under the same ids; only where they lie may differ, and the split."""
    assert sorted(facts_of(derived)) == sorted(ids)
    before, after = facts_of(source), facts_of(derived)
    for name in ids:
        assert_same_bits(derived.state_dict(name), source.state_dict(name))
        for fact in set(before[name]) - {"shard", "row", "split"}:
            assert str(after[name][fact]) == str(before[name][fact]), fact
    assert verify_corpus(derived.location) == []


def test_a_filtered_corpus_holds_what_the_query_selects_bit_for_bit(source: Corpus, tmp_path: Path) -> None:
    selected = source.query(["depth>=4", "group=g1"])
    progress: list[tuple[int, int]] = []
    part = Selection(corpus=source, facts=selected)
    derived = write_corpus(
        str(tmp_path / "c"), [part], {"filter": []}, lambda done, all_: progress.append((done, all_))
    )
    assert_copied(derived, source, [f"run-{run}/{step}" for run in (5, 7, 9) for step in range(3)])
    assert derived.query(["depth=7"]).num_rows == 3
    assert progress[-1] == (9, 9)
    assert list(derived.networks) == derived.facts.column("layout_id").unique().to_pylist()


def test_a_filtered_corpus_knows_the_moments_of_what_it_holds(source: Corpus, tmp_path: Path) -> None:
    derived = write_corpus(str(tmp_path / "c"), [Selection(corpus=source, facts=source.query(["depth<4"]))], {})
    for layout_id in derived.networks:
        values = torch.stack(
            [
                derived.state_dict(row.as_py())["0.weight"]
                for row in derived.select(layout_id=layout_id)["checkpoint_id"]
            ]
        )
        mean, std = derived.moments(layout_id)["0.weight"]
        assert mean == pytest.approx(float(values.double().mean()), rel=1e-6)
        assert std == pytest.approx(float(values.double().std(correction=0)), rel=1e-5)


def test_the_source_is_left_as_it_was(source: Corpus, tmp_path: Path) -> None:
    root = Path(source.location)
    before = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    dedupe(str(tmp_path / "c"), source)
    assert {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()} == before


def test_a_corpus_is_never_overwritten(source: Corpus, tmp_path: Path) -> None:
    part = Selection(corpus=source, facts=source.query(["depth=1"]))
    for root in (source.location, write_corpus(str(tmp_path / "c"), [part], {}).location):
        with pytest.raises(CorpusError, match="already holds a corpus; give another folder"):
            write_corpus(root, [part], {})
    assert Corpus.open(source.location).facts.num_rows == 30


def test_nothing_selected_is_refused(source: Corpus, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no checkpoint is selected; see `raywgen corpus info`"):
        write_corpus(str(tmp_path / "c"), [Selection(corpus=source, facts=source.query(["depth>99"]))], {})
    assert not (tmp_path / "c").exists()


def test_damaged_weights_are_not_copied(tmp_path: Path) -> None:
    corpus = make(tmp_path, "source", runs(1))
    state = corpus.state_dict("run-0/1")
    (shard,) = corpus.shards
    path = Path(corpus.location) / shard.path
    content = bytearray(path.read_bytes())
    content[content.find(state["0.weight"].numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"weights/.*run-0/1' has another checksum"):
        dedupe(str(tmp_path / "c"), Corpus.open(corpus.location))
    with pytest.raises(CorpusError, match="no corpus"):
        Corpus.open(tmp_path / "c")


@pytest.mark.parametrize("by", ["trajectory_id", "group", "start_seed", "layout_id"])
def test_a_split_keeps_groups_whole_and_every_checkpoint(source: Corpus, tmp_path: Path, by: str) -> None:
    derived = split(str(tmp_path / "c"), source, by=by, heldout=0.5, seed=1)
    assert_copied(derived, source, list(facts_of(source)))
    sides: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for row in derived.facts.to_pylist():
        sides[row["split"]].add(str(row[by]))
    assert sides["train"]
    assert sides["heldout"]
    assert not sides["train"] & sides["heldout"]
    assert len(sides["heldout"]) == len(sides["train"])


def heldout(corpus: Corpus) -> list[str]:
    return sorted(corpus.select(split="heldout").column("checkpoint_id").to_pylist())


def test_the_seed_alone_decides_a_split(source: Corpus, tmp_path: Path) -> None:
    found = [
        heldout(split(str(tmp_path / f"c{i}"), source, heldout=0.3, seed=seed)) for i, seed in enumerate([3, 3, 4])
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert [len(ids) for ids in found] == [9, 9, 9]


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01, 0.99, -0.5, 7.0, float("nan")])
def test_a_split_with_an_empty_side_is_refused(source: Corpus, tmp_path: Path, share: float) -> None:
    with pytest.raises(CorpusError, match=r"of 10 groups by trajectory_id leaves one side empty; give another share"):
        split(str(tmp_path / "c"), source, heldout=share)


def test_a_split_by_an_unknown_fact_names_the_nearest(source: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UnknownFactError, match=r"unknown fact 'trajectory'; did you mean 'trajectory_id'\?"):
        split(str(tmp_path / "c"), source, by="trajectory")


def test_a_split_leaves_shared_starts_alone(tmp_path: Path) -> None:
    rows = [{"path": "run-0/0", "split": "base", "task_id": None}, {"path": "run-[1-4]/*", "task_id": "t1"}]
    rows += [{"path": "run-0/[12]", "task_id": "t0"}]
    corpus = make(tmp_path, "source", runs(5), rows)
    derived = split(str(tmp_path / "c"), corpus, by="task_id", heldout=0.5)
    assert derived.select(split="base").column("checkpoint_id").to_pylist() == ["run-0/0"]
    assert set(derived.facts.column("split").to_pylist()) == {"base", "train", "heldout"}
    assert_copied(derived, corpus, list(facts_of(corpus)))


def test_merged_corpora_with_names_of_their_own_keep_them(tmp_path: Path) -> None:
    one = make(tmp_path, "one", {f"a/{name}": state for name, state in runs(3).items()}, [{"path": "*", "depth": 3}])
    two = make(
        tmp_path, "two", {f"b/{name}": state for name, state in runs(2, 500).items()}, [{"path": "*", "note": "n"}]
    )
    merged = merge(str(tmp_path / "c"), [one, two])
    found = facts_of(merged)
    assert sorted(found) == sorted([*facts_of(one), *facts_of(two)])
    for corpus in (one, two):
        for name in facts_of(corpus):
            assert_same_bits(merged.state_dict(name), corpus.state_dict(name))
    assert {name: (row["depth"], row["note"]) for name, row in found.items()} == (
        dict.fromkeys(facts_of(one), (3, None)) | dict.fromkeys(facts_of(two), (None, "n"))
    )
    assert merged.manifest["recipe"]["of"] == [one.location, two.location]
    assert verify_corpus(merged.location) == []


def test_ids_that_clash_get_the_number_of_their_corpus_and_read_back(tmp_path: Path) -> None:
    rows = [*table_rows(3), {"path": "run-1/*", "base_id": "run-1/0"}]
    parts = [make(tmp_path, f"part-{i}", runs(3, 1000 * i), rows) for i in range(3)]
    merged = merge(str(tmp_path / "c"), parts)
    found = facts_of(merged)
    assert len(found) == 27
    for number, corpus in enumerate(parts):
        prefix = f"{number}/" if number else ""
        for name, row in facts_of(corpus).items():
            assert_same_bits(merged.state_dict(prefix + name), corpus.state_dict(name))
            assert found[prefix + name]["trajectory_id"] == prefix + row["trajectory_id"]
            assert found[prefix + name]["base_id"] == (prefix + row["base_id"] if row["base_id"] else None)
    assert [len(rows) for _, rows in merged.trajectories()] == [3] * 9
    again = merge(str(tmp_path / "again"), [merged])
    assert_copied(again, merged, list(found))


def test_tasks_and_bases_go_along(tmp_path: Path) -> None:
    corpus, states = builders.small_corpus(tmp_path / "zoo")
    derived = write_corpus(str(tmp_path / "c"), [Selection(corpus=corpus, facts=corpus.query(["split!=train"]))], {})
    assert list(derived.tasks) == ["task/1"]
    assert torch.equal(derived.tasks["task/1"].samples_SF, corpus.tasks["task/1"].samples_SF)
    assert {shard.num_rows for shard in derived.shards} == {1, 4}, "one split a shard"
    for name in ("base0", "held3"):
        assert_same_bits(derived.state_dict(name), states[name])


def of_task(root: Path, task_id: str, labels: list[int], first_seed: int) -> Corpus:
    """A corpus of two checkpoints that knows one task."""
    states = builders.states(root.name, 2, 2, first_seed)
    layout = Layout.from_state_dict(states[f"{root.name}0"])
    known = replace(builders.task(task_id), recipe={"name": "digits-subset", "labels": labels})
    networks = [NetworkFacts(name="net", recipe={}, layout=layout)]
    shards = [builders.shard(root, "a", states)]
    return commit_corpus(str(root), shards=shards, tasks=[known], networks=networks, recipe={})


def test_a_merge_knows_the_tasks_of_all_its_corpora(tmp_path: Path) -> None:
    parts = [of_task(tmp_path / "one", "task/1", [1, 4], 0), of_task(tmp_path / "two", "task/2", [2, 4], 10)]
    merged = merge(str(tmp_path / "c"), parts)
    assert {name: task.recipe["labels"] for name, task in merged.tasks.items()} == {
        "task/1": [1, 4],
        "task/2": [2, 4],
    }


def test_one_id_of_two_tasks_is_refused(tmp_path: Path) -> None:
    """Networks of the second corpus would be taken for networks of the first one's task."""
    parts = [of_task(tmp_path / "one", "task/1", [1, 4], 0), of_task(tmp_path / "two", "task/1", [2, 4], 10)]
    with pytest.raises(CorpusError, match=r"one and .*two mean different tasks by 'task/1'.*another `task_id`"):
        merge(str(tmp_path / "c"), parts)
    assert not (tmp_path / "c").exists()


def noisy(num: int, seed: int) -> dict[str, StateDict]:
    """Each second one is an earlier one, as it was or with noise of some size."""
    generator = torch.Generator().manual_seed(seed)
    states: dict[str, StateDict] = {}
    for index in range(num):
        if index % 2 == 0:
            states[f"net-{index:02d}"] = network(2 + index % 4, index)
            continue
        earlier = list(states.values())[int(torch.randint(index, (), generator=generator))]
        size = [0.0, 0.01, 0.1, 1.0][int(torch.randint(4, (), generator=generator))]
        noise = {
            name: tensor + size * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in earlier.items()
        }
        states[f"net-{index:02d}"] = {name: tensor.clone() for name, tensor in noise.items()}
    return states


def brute_force(states: dict[str, StateDict], near: float) -> list[str]:
    kept: dict[str, StateDict] = {}
    for name, state in states.items():
        doubles = False
        for other in kept.values():
            if state["0.weight"].shape != other["0.weight"].shape:
                continue
            if near == 0:
                doubles |= all(torch.equal(state[key], other[key]) for key in state)
            else:
                one, two = (
                    torch.cat([s[key].flatten().double() for key in ("0.weight", "0.bias")]) for s in (state, other)
                )
                doubles |= bool((one - two).norm() <= near * two.norm())
        if not doubles:
            kept[name] = state
    return sorted(kept)


@pytest.mark.parametrize("near", [0.0, 0.05, 0.5, 1.2])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("at_once", [4, 512])
def test_dedupe_keeps_what_brute_force_keeps(
    tmp_path: Path, near: float, seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raywgen.corpus.at_once._NETWORKS", at_once)
    states = noisy(30, seed)
    corpus = make(tmp_path, "source", states)
    derived = dedupe(str(tmp_path / "c"), corpus, near=near)
    expected = brute_force(states, near)
    assert 0 < len(expected) < len(states)
    assert_copied(derived, corpus, expected)


def test_no_more_networks_are_held_than_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raywgen.corpus.at_once._NETWORKS", 3)
    # They have one norm, so that each has to be compared with all before it.
    states = {f"net-{index:02d}": {"0.weight": 3.0 * torch.eye(20)[index]} for index in range(20)}
    corpus = make(tmp_path, "source", states)
    (layout,) = (known.layout for known in corpus.networks.values())
    with NetworksHeld([layout]) as held:
        kept = networks_apart(corpus, layout.id, range(20), 0.01)
    assert len(kept) == 20
    assert held.most == 3, held.function


def test_checkpoints_without_weights_are_doubles_only_if_equal(tmp_path: Path) -> None:
    states = {f"net-{index}": {"codes": torch.tensor([index % 3, 7])} for index in range(6)}
    derived = dedupe(str(tmp_path / "c"), make(tmp_path, "source", states), near=0.1)
    assert sorted(facts_of(derived)) == ["net-0", "net-1", "net-2"]


def test_a_split_leaves_tasks_that_are_held_out_whole_as_they_are(tmp_path: Path, zoo_corpus: Corpus) -> None:
    halves = split(str(tmp_path / "c"), zoo_corpus, by="task_id", heldout=0.5)
    before = {row["checkpoint_id"]: row["split"] for row in zoo_corpus.facts.to_pylist()}
    sides: dict[str, set[str]] = {}
    for row in halves.facts.to_pylist():
        if before[row["checkpoint_id"]] in ("train", "heldout"):
            sides.setdefault(row["task_id"], set()).add(row["split"])
        else:
            assert row["split"] == before[row["checkpoint_id"]]
    assert len(sides) == 12
    assert sorted(map(sorted, sides.values())) == [["heldout"]] * 6 + [["train"]] * 6


@pytest.mark.parametrize(
    ("task", "network", "said"),
    [
        ({"labels": [1, 2]}, {}, "mean different tasks by 't'.*another `task_id`"),
        ({}, {"widths": [4, 3, 2], "activation": "tanh"}, "of the same tensors by.*corpora of their own"),
        ({"labels": [0, 1]}, {"widths": [4, 3, 2]}, ""),
        ({}, {}, ""),
    ],
)
def test_a_merge_refuses_tasks_and_recipes_that_contradict(
    tmp_path: Path, task: dict[str, Any], network: dict[str, Any], said: str
) -> None:
    recipes_of = [({"labels": [0, 1]}, {"widths": [4, 3, 2]}), (task, network)]
    corpora = [described(tmp_path / f"{number}", *recipes) for number, recipes in enumerate(recipes_of)]
    if said:
        with pytest.raises(CorpusError, match=said) as refused:
            merge(str(tmp_path / "both"), corpora)
        assert all(corpus.location in str(refused.value) for corpus in corpora)
        assert not (tmp_path / "both").exists()
    else:
        merged = merge(str(tmp_path / "both"), corpora)
        assert [dict(net.recipe) for net in merged.networks.values()] == [{"name": "mlp", "widths": [4, 3, 2]}]
        assert set(merged.tasks) == {"t"}


def described(folder: Path, task: dict[str, Any], recipe: dict[str, Any]) -> Corpus:
    """One network, with a task and a recipe where they are given."""
    corpus = make(folder, "c", {"net": network(3, 0)}, [{"path": "*", "task_id": "t"}])
    (name,) = (net.name for net in corpus.networks.values())
    tasks = [
        TaskFacts(
            task_id="t",
            instruction="Which digit?",
            recipe={"name": "digits-subset", **task},
            split="seen",
            samples_SF=torch.zeros(2, 4),
            labels_S=torch.tensor([0, 1]),
        )
    ]
    return describe(corpus.location, tasks if task else [], {name: {"name": "mlp", **recipe}} if recipe else {})


def test_a_prefix_that_is_taken_is_passed_over(tmp_path: Path) -> None:
    one = make(tmp_path, "one", {"a": network(3, 0), "1/a": network(3, 1)}, [])
    two = make(tmp_path, "two", {"a": network(3, 2)}, [])
    merged = merge(str(tmp_path / "both"), [one, two])
    assert sorted(facts_of(merged)) == ["1/a", "2/a", "a"]
    assert_same_bits(merged.state_dict("2/a"), two.state_dict("a"))
    assert_same_bits(merged.state_dict("1/a"), one.state_dict("1/a"))


def test_two_layouts_of_one_name_stay_apart_in_a_merge(tmp_path: Path) -> None:
    corpora = []
    for width in (2, 3):
        (tmp_path / str(width)).mkdir()
        save_file({"w": torch.ones(width)}, tmp_path / str(width) / f"net{width}.safetensors")
        (tmp_path / "facts.csv").write_text("path,architecture\n*,net\n")
        config = BuildConfig(
            out=str(tmp_path / f"c{width}"),
            sources=[str(tmp_path / str(width))],
            facts=str(tmp_path / "facts.csv"),
            distributed=False,
        )
        corpora.append(build_corpus(config))
    both = merge(str(tmp_path / "both"), corpora)
    assert sorted(both.info()["networks"].values()) == [2, 3]
    assert all(name.startswith("net-") for name in both.info()["networks"])
