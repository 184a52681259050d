"""One network is one architecture, whatever the order, dtypes and wrappers of its tensors in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.derive import Selection, dedupe, split, write_corpus
from raywgen.corpus.export import export
from raywgen.corpus.merge import merge
from raywgen.corpus.verify import verify_corpus
from raywgen.sealed import sealed_json
from raywgen.weights import Layout, StateDict, load_state_dict
from raywgen.weights.names import plain_names
from tests.corpus.builders import assert_same_bits

State = Mapping[str, Tensor]


def net(seed: int) -> StateDict:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
        state = dict(module.state_dict())
    state["1.num_batches_tracked"] = torch.tensor(seed)
    return state


def half(state: State) -> StateDict:
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}


def sorted_by_name(state: State) -> StateDict:
    return dict(sorted(state.items()))


def renamed(state: State, to: Mapping[str, str]) -> StateDict:
    changed = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        changed[f"{to.get(first, first)}.{rest}"] = value
    return changed


FORMS = {
    "a-plain": lambda state: state,
    "b-sorted": sorted_by_name,
    "c-half": half,
    "d-compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "e-inner": lambda state: renamed(state, {"0": "0._orig_mod", "3": "3._checkpoint_wrapped_module"}),
    "f-lightning": lambda state: {f"model.{name}": value for name, value in state.items()},
    "g-ddp-of-compiled": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "h-inner-ddp": lambda state: renamed(state, {"3": "3.module"}),
    "i-deepspeed": lambda state: {f"_forward_module.{name}": value for name, value in half(state).items()},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Every form of networks 0 and 1."""
    root = tmp_path_factory.mktemp("forms")
    for name, change in FORMS.items():
        for seed in (0, 1):
            (root / "in" / name).mkdir(parents=True, exist_ok=True)
            torch.save(change(net(seed)), root / "in" / name / f"{seed}.pt")
    return build(root / "corpus", root / "in")


def build(out: Path, *sources: Path, **settings: object) -> Corpus:
    config = BuildConfig(out=str(out), sources=[str(source) for source in sources], distributed=False, **settings)  # pyright: ignore[reportArgumentType]
    return build_corpus(config)


def test_all_forms_are_one_architecture_in_the_order_of_the_network(corpus: Corpus) -> None:
    (network,) = corpus.networks.values()
    assert [spec.name for spec in network.layout.tensors] == list(net(0))
    assert network.layout.dtype == "float32"
    assert set(corpus.facts.column("layout_id").to_pylist()) == {network.layout.id}
    assert not verify_corpus(corpus.location)


@pytest.mark.parametrize("form", FORMS)
def test_each_comes_back_bit_for_bit_in_its_own_order_dtype_and_names(
    corpus: Corpus, tmp_path: Path, form: str
) -> None:
    wanted = FORMS[form](net(1))
    facts = corpus.select(checkpoint_id=f"{form}/1").to_pylist()[0]
    stored = corpus.state_dict(f"{form}/1")
    assert_same_bits({facts["key_prefix"] + name: value for name, value in stored.items()}, wanted)
    export(corpus, tmp_path, [f"checkpoint_id={form}/1"])
    assert_same_bits(load_state_dict(tmp_path / form / "1.safetensors"), wanted)


def test_flat_vectors_of_all_forms_are_in_one_order(corpus: Corpus) -> None:
    values_ND = corpus.values(corpus.facts)
    for row, facts in enumerate(corpus.facts.to_pylist()):
        form, seed = facts["checkpoint_id"].split("/")
        wanted = half(net(int(seed))) if form in ("c-half", "i-deepspeed") else net(int(seed))
        assert torch.equal(values_ND[row], Layout.from_state_dict(net(0)).flatten(wanted)), form
    mean = float(values_ND[:, :36].mean())
    assert corpus.moments(next(iter(corpus.networks)))["0.weight"][0] == pytest.approx(mean, abs=1e-6)


def test_streams_read_all_forms_in_one_order(corpus: Corpus) -> None:
    stream = corpus.stream(chunk_length=7, batch_size=5, prefetch=0)
    values_ND = corpus.values(stream.facts)
    seen = 0
    for batch in stream.epoch():
        for values_K, length, row, chunk in zip(
            batch.values_BK, batch.length_B, batch.checkpoint_B, batch.chunk_B, strict=True
        ):
            start = 7 * int(chunk)
            assert torch.equal(values_K[:length], values_ND[row, start : start + int(length)])
            seen += int(length)
    assert seen == values_ND.numel()


def test_doubles_are_found_over_orders_and_wrappers(corpus: Corpus, tmp_path: Path) -> None:
    # What bfloat16 keeps is another network bit by bit, and a near one.
    assert dedupe(str(tmp_path / "once"), corpus).facts.num_rows == 4
    assert dedupe(str(tmp_path / "near"), corpus, near=1e-2).facts.num_rows == 2


def test_what_is_exported_comes_back_as_the_same_architecture(corpus: Corpus, tmp_path: Path) -> None:
    export(corpus, tmp_path / "out")
    again = build(tmp_path / "again", tmp_path / "out")
    assert {key: network.layout for key, network in again.networks.items()} == {
        key: network.layout for key, network in corpus.networks.items()
    }
    for facts in corpus.facts.to_pylist():
        assert_same_bits(again.state_dict(facts["checkpoint_id"]), corpus.state_dict(facts["checkpoint_id"]))


@pytest.mark.parametrize("derive", ["merge", "split", "copy"])
def test_derived_corpora_keep_every_form(corpus: Corpus, tmp_path: Path, derive: str) -> None:
    out = str(tmp_path / "out")
    if derive == "merge":
        derived = merge(out, [corpus])
    elif derive == "split":
        derived = split(out, corpus, heldout=0.2)
    else:
        derived = write_corpus(out, [Selection(corpus=corpus, facts=corpus.facts)], {})
    assert not verify_corpus(out)
    for name in corpus.facts.column("checkpoint_id").to_pylist():
        assert_same_bits(derived.state_dict(name), corpus.state_dict(name))
    for name, moments in corpus.moments(next(iter(corpus.networks))).items():
        assert derived.moments(next(iter(corpus.networks)))[name] == pytest.approx(moments, abs=1e-9)


def test_a_network_whose_files_are_all_sorted_gets_their_order(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(2):
        save_file(net(seed), tmp_path / "in" / f"{seed}.safetensors")
    (network,) = build(tmp_path / "corpus", tmp_path / "in").networks.values()
    assert [spec.name for spec in network.layout.tensors] == sorted(
        net(0), key=lambda name: ("batches" not in name, name)
    )


def test_a_corpus_of_the_first_schema_opens_with_layouts_by_architecture(corpus: Corpus, tmp_path: Path) -> None:
    """In it each form of an architecture was a layout and a network of its own."""
    (tmp_path / "in").mkdir()
    torch.save(net(0), tmp_path / "in" / "a.pt")
    save_file(net(1), tmp_path / "in" / "b.safetensors")
    new = build(tmp_path / "corpus", tmp_path / "in")
    path = tmp_path / "corpus" / "manifest.json"
    manifest = json.loads(path.read_text())
    (network,) = manifest["networks"]
    rows = {"first": network["layout"], "second": next(iter(manifest.pop("forms").values()))}
    ids = {name: Layout.from_json(layout).form_id for name, layout in rows.items()}
    del network["form_id"]
    manifest["networks"] = [network | {"name": name, "layout": layout} for name, layout in rows.items()]
    for shard, form_id in zip(manifest["shards"], ids.values(), strict=True):
        shard.pop("form_id", None)
        shard["layout_id"] = form_id
    manifest |= {"schema_version": 1, "statistics": {}}
    del manifest["checksum"]
    path.write_text(sealed_json(manifest))
    old = Corpus.open(tmp_path / "corpus")
    assert list(old.networks) == list(new.networks)
    assert_same_bits(old.state_dict("a"), net(0))
    assert torch.equal(old.values(old.facts), new.values(new.facts))


def test_segments_that_would_make_two_names_one_stay() -> None:
    assert plain_names(["a._orig_mod.w", "a.w"]) == ["a._orig_mod.w", "a.w"]
    assert plain_names(["a.module.w", "a.w"]) == ["a.module.w", "a.w"]
    assert plain_names(["model.a", "b"]) == ["model.a", "b"]
    assert plain_names(["model.model.a", "model.model.b"]) == ["a", "b"]
    assert plain_names(["module", "x.module"]) == ["module", "x.module"]
