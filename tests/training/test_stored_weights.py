"""Weights are read where they lie, whole or in windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raywgen.benchmarks.random_corpus import random_facts
from raywgen.corpus import Corpus, NetworkFacts, commit_corpus, write_shard
from raywgen.generators import Stage
from raywgen.generators.bundle import build_generator
from raywgen.generators.igpg import IGPGConfig
from raywgen.training.batch_plan import StageView
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.rows import layout_rows
from raywgen.training.stored_weights import StoredWeights
from raywgen.weights import KeyedNoise, Layout, NonFiniteWeightsError, StateDict
from tests.builders import SMALL, igpg_config, layout_of, values_of
from tests.training.whole_plan import WholePlan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("large", [1, 1 << 16])
def test_weights_are_those_of_the_corpus_in_any_order(
    zoo_corpus: Corpus, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raywgen.training.stored_weights._LARGE", large)
    for layout_id, network in zoo_corpus.networks.items():
        facts = zoo_corpus.select(layout_id=layout_id, split="train")
        stored, wanted_ND = StoredWeights(zoo_corpus, network.layout, facts), zoo_corpus.values(facts)
        index_B = torch.tensor([3, 0, len(stored) - 1, 3])
        assert torch.equal(stored.values(index_B), wanted_ND[index_B])


def test_windows_are_cut_anywhere_and_end_in_zeros(zoo_corpus: Corpus) -> None:
    layout_id, network = next(iter(zoo_corpus.networks.items()))
    facts = zoo_corpus.select(layout_id=layout_id, split="train")
    stored, wanted_ND = StoredWeights(zoo_corpus, network.layout, facts), zoo_corpus.values(facts)
    num_values = network.layout.num_values
    for length in (1, 7, 40):
        padded_ND = torch.nn.functional.pad(wanted_ND, (0, length))
        start_B = torch.tensor([0, 5, num_values - length // 2 - 1, num_values - 1])
        index_B = torch.tensor([1, 4, 0, 2])
        found_BX = stored.windows(index_B, start_B, length)
        expected = [padded_ND[i, s : s + length] for i, s in zip(index_B, start_B, strict=True)]
        assert torch.equal(found_BX, torch.stack(expected))


@pytest.mark.parametrize("index", [0, 1])
def test_a_stage_sees_in_windows_what_it_sees_of_whole_networks(zoo_corpus: Corpus, index: int) -> None:
    """The trainer reads the windows alone; a stage that is given whole networks cuts the same ones out of them."""
    generator = build_generator("igpg", windowed(), measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0)
    stage: Stage = generator.stages()[index].train()
    plan = WholePlan(layout_rows(zoo_corpus, ["train"]), seed=3, num_condition_samples=5, num_query_samples=7)
    if index == 0:
        stage.setup([plan.whole_batch(step, 16) for step in range(2)], 0)
    for step in range(4):
        batch, noise = plan.for_stage(step, 8, StageView(stage, 0, 5))
        whole = plan.batch(step, 8)
        assert batch.windows is not None
        assert batch.values_BD.shape[1] < whole.values_BD.shape[1]
        in_windows = stage(batch, noise).loss
        assert torch.equal(in_windows, stage(whole, KeyedNoise(0, whole.sample_index_B, 5)).loss)
        assert not torch.equal(in_windows, stage(whole, KeyedNoise(1, whole.sample_index_B, 5)).loss)


def windowed() -> IGPGConfig:
    config = igpg_config()
    config.tokenizer.window = 3
    config.prior.window = 4
    return config


def test_a_value_that_is_no_number_is_named_by_checkpoint_and_tensor(tmp_path: Path) -> None:
    layout = layout_of(SMALL)
    spec, start = layout.generated[1], layout.generated[0].num_values
    states = [layout.unflatten(values_D) for values_D in values_of(SMALL)[:2].clone()]
    states[1][spec.name].view(-1)[0] = torch.nan
    corpus = unchecked_corpus(tmp_path, layout, states)
    stored = StoredWeights(corpus, layout, corpus.facts)
    index_2 = torch.tensor([0, 1])
    message = rf"checkpoint network-1: tensor '{spec.name}' holds NaN"
    with pytest.raises(NonFiniteWeightsError, match=message):
        stored.values(index_2)
    with pytest.raises(NonFiniteWeightsError, match=message):
        stored.windows(index_2, torch.tensor([0, start - 3]), 5)
    assert bool(stored.windows(index_2, torch.tensor([0, start + 1]), 5).isfinite().all())


def unchecked_corpus(folder: Path, layout: Layout, states: list[StateDict]) -> Corpus:
    """A corpus as another program may write one, which did not look at the values."""
    packed_NP = torch.stack([layout.pack(state) for state in states])
    facts = [random_facts(f"network-{index}", layout) for index in range(len(states))]
    shard = write_shard(str(folder), "all", layout, facts, packed_NP, is_finite=True)
    network = NetworkFacts(name="small", recipe={}, layout=layout)
    return commit_corpus(str(folder), shards=[shard], tasks=[], networks=[network], recipe={})
