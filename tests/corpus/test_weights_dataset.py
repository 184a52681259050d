from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from raywgen import WeightsDataset
from raywgen.corpus import Corpus, CorpusError, UnknownFactError


def test_a_corpus_is_a_sequence_of_checkpoints(zoo_corpus: Corpus) -> None:
    assert len(zoo_corpus) == zoo_corpus.facts.num_rows
    last = zoo_corpus[-1]
    assert (
        last.facts
        == zoo_corpus[len(zoo_corpus) - 1].facts
        == zoo_corpus.facts.slice(len(zoo_corpus) - 1).to_pylist()[0]
    )
    expected = zoo_corpus.state_dict(last.facts["checkpoint_id"])
    assert list(last.weights) == list(expected)
    assert all(torch.equal(last.weights[name], tensor) for name, tensor in expected.items())
    assert [one.facts["checkpoint_id"] for one in zoo_corpus] == zoo_corpus.facts.column("checkpoint_id").to_pylist()
    with pytest.raises(IndexError):
        _ = zoo_corpus[len(zoo_corpus)]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_loader_of_torch_reads_it(zoo_corpus: Corpus, num_workers: int) -> None:
    terms = ["architecture=mlp-64-6-2", "step=120"]
    dataset = WeightsDataset(zoo_corpus, terms, facts=["checkpoint_id", "test_accuracy"])
    expected = zoo_corpus.values(zoo_corpus.query(terms))
    # Torch's lock of a forked process may be held; a spawned one opens the corpus itself.
    context = "spawn" if num_workers else None
    batches = list(DataLoader(dataset, batch_size=16, num_workers=num_workers, multiprocessing_context=context))
    assert torch.equal(torch.cat([batch["values"] for batch in batches]), expected)
    ids = [one for batch in batches for one in batch["checkpoint_id"]]
    assert ids == zoo_corpus.query(terms).column("checkpoint_id").to_pylist()
    assert torch.equal(dataset[-1]["values"], expected[-1])


def test_several_architectures_or_unknown_facts_are_refused(zoo_corpus: Corpus) -> None:
    with pytest.raises(
        CorpusError, match=r"checkpoints of 2 architectures satisfy \[\]; name one, as in architecture="
    ):
        WeightsDataset(zoo_corpus)
    with pytest.raises(UnknownFactError, match="did you mean 'test_accuracy'"):
        WeightsDataset(zoo_corpus, ["architecture=mlp-64-6-2"], facts=["test_acuracy"])
