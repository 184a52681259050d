from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raywgen.corpus import Corpus, CorpusError, verify_corpus
from raywgen.corpus.align import AlignConfig, align, summary
from raywgen.tasks import build_network
from raywgen.zoo import ZooConfig
from tests.conftest import make_zoo
from tests.corpus.builders import assert_same_bits
from tests.corpus.test_derive import make

NETS = [[64, 6, 2], [64, 5, 4, 2]]
OWN = ZooConfig(
    networks=NETS,
    num_seen_tasks=2,
    num_validation_tasks=0,
    num_unseen_tasks=1,
    seeds_per_task=3,
    num_steps=20,
    checkpoint_steps=[10, 20],
    start="own",
    num_condition_samples=8,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_zoo(OWN, tmp_path_factory.mktemp("own") / "corpus")


@pytest.fixture(scope="module")
def aligned(source: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return align(str(tmp_path_factory.mktemp("aligned") / "corpus"), source, build_network)


def facts_of(corpus: Corpus) -> dict[str, dict[str, Any]]:
    return {row["checkpoint_id"]: row for row in corpus.facts.to_pylist()}


def module_of(corpus: Corpus, checkpoint_id: str) -> nn.Module:
    network = corpus.networks[facts_of(corpus)[checkpoint_id]["layout_id"]]
    module = build_network(network.recipe).double().eval()
    module.load_state_dict(corpus.state_dict(checkpoint_id))
    return module


def order_of(source: Corpus, aligned: Corpus, checkpoint_id: str) -> list[int]:
    """Where the first layer's units came from, by their weights."""
    before, after = (corpus.state_dict(checkpoint_id)["0.weight"] for corpus in (source, aligned))
    return [int((before == row).all(dim=1).nonzero()[0]) for row in after]


def test_every_network_computes_what_it_did(source: Corpus, aligned: Corpus) -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = 0
    for name in facts_of(source):
        before, after = module_of(source, name), module_of(aligned, name)
        assert torch.allclose(before(x), after(x), atol=1e-12)
        moved += not torch.equal(source.state_dict(name)["0.weight"], aligned.state_dict(name)["0.weight"])
    assert moved > len(facts_of(source)) / 2
    assert verify_corpus(aligned.location) == []


def test_every_other_fact_is_kept(source: Corpus, aligned: Corpus) -> None:
    before, after = facts_of(source), facts_of(aligned)
    assert list(before) == list(after)
    for name, row in before.items():
        for fact in set(row) - {"shard", "row", "sha256", "xxh3"}:
            assert str(after[name][fact]) == str(row[fact]), fact
    assert list(aligned.tasks) == list(source.tasks)
    assert aligned.networks == source.networks
    assert aligned.manifest["recipe"]["of"] == [source.location]


def test_a_trajectory_is_reordered_by_its_last_checkpoint(source: Corpus, aligned: Corpus) -> None:
    for _, rows in aligned.trajectories():
        ids, steps = rows.column("checkpoint_id").to_pylist(), rows.column("step").to_pylist()
        assert len({tuple(order_of(source, aligned, name)) for name in ids}) == 1
        assert rows.column("aligned_by").to_pylist() == [ids[steps.index(max(steps))]] * 2


def test_facts_say_how_each_was_aligned(source: Corpus, aligned: Corpus) -> None:
    found = facts_of(aligned)
    references = {row["aligned_to"] for row in found.values()}
    assert len(references) == 2, "one for each architecture"
    assert sorted(row[:2] for row in summary(aligned)) == sorted((name, 8) for name in references)
    for row in found.values():
        assert found[row["aligned_to"]]["split"] == "train"
        assert row["aligned_distance"] <= row["unaligned_distance"] + 1e-6
        reference, last = (
            torch.cat([tensor.flatten() for tensor in aligned.state_dict(row[name]).values()])
            for name in ("aligned_to", "aligned_by")
        )
        assert row["aligned_distance"] == pytest.approx(float((last - reference).norm() / reference.norm()), abs=1e-5)
    for name in references:
        assert_same_bits(aligned.state_dict(name), source.state_dict(name))
        assert (found[name]["moved_units"], found[name]["aligned_distance"]) == (0, 0.0)
    assert max(row["moved_units"] for row in found.values()) > 2
    assert all(before > after for _, _, before, after in summary(aligned))


def test_a_reference_is_taken_by_its_id_and_aligning_again_replaces_the_facts(source: Corpus, tmp_path: Path) -> None:
    wanted = sorted(facts_of(source))[-1]
    once = align(str(tmp_path / "a"), source, build_network, AlignConfig(references=[wanted]))
    assert wanted in {row["aligned_to"] for row in facts_of(once).values()}
    assert_same_bits(once.state_dict(wanted), source.state_dict(wanted))
    again = align(str(tmp_path / "b"), once, build_network, AlignConfig(references=[wanted]))
    assert again.facts.column_names == once.facts.column_names
    for row in facts_of(again).values():
        assert row["aligned_distance"] <= facts_of(once)[row["checkpoint_id"]]["aligned_distance"] + 1e-6


def test_progress_counts_trajectories_then_checkpoints(source: Corpus, tmp_path: Path) -> None:
    matched: list[tuple[int, int]] = []
    written: list[tuple[int, int]] = []
    align(
        str(tmp_path / "a"),
        source,
        build_network,
        on_match=lambda done, total: matched.append((done, total)),
        on_progress=lambda done, total: written.append((done, total)),
    )
    assert matched == [(9, 18), (18, 18)]
    assert written[-1] == (36, 36)


def refused(source: Corpus, root: Path, match: str, **config: Any) -> None:
    with pytest.raises(CorpusError, match=match):
        align(str(root / "refused"), source, build_network, AlignConfig(**config))
    assert not (root / "refused").exists()


def test_references_that_cannot_be_used_are_refused(source: Corpus, tmp_path: Path) -> None:
    refused(
        source, tmp_path, r"holds no checkpoint 'nobody' to align to; give one, for instance '", references=["nobody"]
    )
    (layout_id, *_) = source.networks
    two = source.select(layout_id=layout_id).column("checkpoint_id").to_pylist()[:2]
    refused(source, tmp_path, r"are of one architecture \(mlp-64-6-2\); give one reference for each", references=two)


def test_a_shared_start_needs_no_alignment(zoo_corpus: Corpus, tmp_path: Path) -> None:
    refused(zoo_corpus, tmp_path, r"have a start in common .*corpus filter .* OUT start=own")


def test_an_existing_corpus_is_not_overwritten(source: Corpus) -> None:
    with pytest.raises(CorpusError, match="already holds a corpus; give another folder"):
        align(source.location, source, build_network)


def files(tmp_path: Path, recipe: dict[str, Any]) -> Corpus:
    """Networks of the user's own, as files: the corpus knows neither recipe nor task."""
    states = {}
    for seed in range(3):
        torch.manual_seed(seed)
        states[f"net-{seed}"] = build_network(recipe).state_dict()
    return make(tmp_path, "files", states)


def test_networks_from_files_are_aligned_by_a_recipe_and_an_input_shape(tmp_path: Path) -> None:
    recipe = {"name": "cifar-resnet", "depth": 8, "widths": [2, 3, 4]}
    corpus = files(tmp_path, recipe)
    refused(corpus, tmp_path, r"does not know how to build 'files-files'.*--network")
    refused(corpus, tmp_path, r"no tasks to show what its networks take; .*--input-shape 3,32,32", network=recipe)
    wrong = {"name": "cifar-resnet", "depth": 14, "widths": [2, 3, 4]}
    refused(
        corpus,
        tmp_path,
        r"builds another network .*'layer1.1.conv1.weight' is missing.*give its own recipe",
        network=wrong,
        input_shape=[3, 8, 8],
    )
    config = AlignConfig(network=recipe, input_shape=[3, 8, 8])
    aligned = align(str(tmp_path / "a"), corpus, build_network, config)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = build_network(recipe).double().eval()
    for name in facts_of(corpus):
        outputs = []
        for one in (corpus, aligned):
            module.load_state_dict(one.state_dict(name))
            outputs.append(module(x))
        assert torch.allclose(*outputs, atol=1e-10)


def test_one_recipe_for_several_architectures_is_refused(source: Corpus, tmp_path: Path) -> None:
    refused(
        source, tmp_path, r"several architectures.*architecture=mlp-64", network={"name": "mlp", "widths": [64, 6, 2]}
    )


def test_networks_without_hidden_units_are_refused(tmp_path: Path) -> None:
    recipe = {"name": "mlp", "widths": [3, 2]}
    corpus = files(tmp_path, recipe)
    refused(corpus, tmp_path, "no hidden units that may change places", network=recipe, input_shape=[3])
