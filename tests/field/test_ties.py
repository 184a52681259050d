"""Two names of one tensor stay one tensor: in a corpus, in files, in what is written and filled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn

from raywgen.corpus.export import export
from raywgen.corpus.merge import merge
from raywgen.weights import Layout, LayoutMismatchError, StateDict, WeightsError, load_state_dict
from tests.corpus.builders import assert_same_bits
from tests.field.builders import build, reasons, save


class Tied(nn.Module):
    """A head that is the embedding, as of language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


NUM_VALUES = 11 * 6 + 6 * 6 + 6


def tied(seed: int) -> Tied:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tied()


def is_one(state: StateDict) -> bool:
    return state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_ties_come_in_and_go_out_of_every_format(tmp_path: Path, kind: str) -> None:
    module = tied(0)
    path = tmp_path / "in" / ("net.safetensors" if kind == "safetensors" else "net.pt")
    path.parent.mkdir()
    if kind == "safetensors":
        # It leaves one of the names out, and says so in the metadata.
        save_model(module, str(path))
        assert len(safe_open(path, "pt").keys()) == 3
    else:
        save(path, module.state_dict(), _use_new_zipfile_serialization=kind == "zip")
    corpus = build(tmp_path, tmp_path / "in")
    (network,) = corpus.networks.values()
    assert network.layout.num_values == NUM_VALUES
    stored = corpus.state_dict("net")
    assert set(stored) == set(module.state_dict())
    assert is_one(stored)
    for name, value in module.state_dict().items():
        assert torch.equal(stored[name], value)
    export(corpus, tmp_path / "out")
    assert_same_bits(load_state_dict(tmp_path / "out" / "net.safetensors"), stored)
    with safe_open(tmp_path / "out" / "net.safetensors", "pt") as file:
        assert file.metadata()["head.weight"] == "embed.weight" or file.metadata()["embed.weight"] == "head.weight"
        assert torch.equal(file.get_tensor("head.weight"), file.get_tensor("embed.weight"))
    again = build(tmp_path, tmp_path / "out", out="again")
    assert next(iter(again.networks.values())).layout == network.layout
    assert is_one(again.state_dict("net"))


def test_files_with_both_names_or_one_are_one_architecture_as_is_the_module(tmp_path: Path) -> None:
    state = dict(tied(0).state_dict())
    save(tmp_path / "in" / "both.pt", state)
    save(tmp_path / "in" / "one.safetensors", {name: value for name, value in state.items() if name != "head.weight"})
    corpus = build(tmp_path, tmp_path / "in")
    (layout,) = (network.layout for network in corpus.networks.values())
    values_ND = corpus.values(corpus.facts)
    assert torch.equal(values_ND[0], values_ND[1])
    assert set(corpus.state_dict("one")) == {"embed.weight", "body.weight", "body.bias"}
    with torch.device("meta"):
        assert Layout.from_state_dict(Tied().state_dict()).id == layout.id
    assert is_one(merge(str(tmp_path / "merged"), [corpus]).state_dict("both"))


def test_flat_vectors_hold_a_tied_tensor_once(tmp_path: Path) -> None:
    layout = Layout.from_state_dict(tied(0).state_dict())
    module = tied(1)
    module.load_state_dict(layout.unflatten(layout.flatten(tied(0).state_dict())))
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.head.weight, tied(0).embed.weight)
    untied = {name: value.clone() for name, value in tied(0).state_dict().items()}
    layout.check(untied)
    untied["head.weight"] += 1
    with pytest.raises(LayoutMismatchError, match=r"'head\.weight' differs from 'embed\.weight'"):
        layout.check(untied)


def test_views_of_one_storage_that_are_not_one_tensor_stay_apart(tmp_path: Path) -> None:
    big = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    state = {"q": big[:10], "k": big[10:20], "all": big, "t": big.t(), "s": big[0, 0], "flat": big.view(-1)}
    save(tmp_path / "in" / "views.pt", state)
    corpus = build(tmp_path, tmp_path / "in")
    assert_same_bits(corpus.state_dict("views"), {name: value.contiguous() for name, value in state.items()})
    assert next(iter(corpus.networks.values())).layout.num_values == 60 + 60 + 300 + 300 + 1 + 300


def test_metadata_that_tie_what_differs_are_refused(tmp_path: Path) -> None:
    state = {"a": torch.zeros(3), "b": torch.ones(3)}
    (tmp_path / "in").mkdir()
    save_file(state, tmp_path / "in" / "false.safetensors", {"b": "a"})
    save_file(state, tmp_path / "in" / "facts.safetensors", {"format": "a", "a": "none", "b": "7"})
    with pytest.raises(WeightsError, match="metadata tie tensor 'b' to another one, from which it differs"):
        load_state_dict(tmp_path / "in" / "false.safetensors")
    corpus = build(tmp_path, tmp_path / "in")
    assert list(reasons(corpus)) == ["false"]
    assert_same_bits(corpus.state_dict("facts"), state)
