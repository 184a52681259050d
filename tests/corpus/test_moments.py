"""Moments of tensors are those of the values that a generator sees, from the manifest or from one pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus import moments as moments_module
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.derive import Selection, write_corpus
from raywgen.corpus.describe import describe
from raywgen.corpus.moments import TensorMoments, tensor_moments
from raywgen.sealed import sealed_json
from raywgen.weights import Normalizer, StateDict
from tests.corpus import builders


def network(seed: int, width: int = 3) -> StateDict:
    torch.manual_seed(seed)
    state = nn.Sequential(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.Linear(4, width)).state_dict()
    for name in ("1.weight", "1.bias", "1.running_mean"):
        state[name].normal_()
    # Some are below the least variance that has a logarithm.
    state["1.running_var"].uniform_(-0.5, 3).clamp_(min=0)
    return state


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two architectures, one of them in two dtypes, in two splits, without shared starts."""
    files, out = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("corpus")
    rows = ["path,split"]
    for index in range(24):
        state = network(index, width=3 + index % 2)
        if index % 6 == 0:
            state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        save_file(state, files / f"n{index:02d}.safetensors")
        rows.append(f"n{index:02d},{'heldout' if index % 5 == 3 else 'train'}")
    (out / "facts.csv").write_text("\n".join(rows))
    return build_corpus(
        BuildConfig(out=str(out / "c"), sources=[str(files)], facts=str(out / "facts.csv"), distributed=False)
    )


def seen(state: StateDict, name: str) -> Tensor:
    values = state[name].double()
    return values.clamp(min=1e-6).log() if name.endswith("running_var") else values


def assert_moments_of(found: TensorMoments, states: list[StateDict], names: list[str]) -> None:
    assert found.num_checkpoints == len(states)
    for mean, spread, name in zip(found.mean_N.tolist(), found.spread_N.tolist(), names, strict=True):
        values = torch.stack([seen(state, name) for state in states])
        assert mean == pytest.approx(float(values.mean()), rel=1e-6, abs=1e-9), name
        assert spread == pytest.approx(float(values.std(correction=0)), rel=1e-5), name


def states_of(corpus: Corpus, **equals: object) -> list[StateDict]:
    return [corpus.state_dict(name.as_py()) for name in corpus.select(**equals)["checkpoint_id"]]


def assert_moments_of_split(corpus: Corpus, split: str) -> None:
    found = tensor_moments(corpus, split)
    assert found.keys() == corpus.networks.keys()
    for layout_id, moments in found.items():
        names = [spec.name for spec in corpus.layout(layout_id).generated]
        assert "1.running_var" in names
        assert not moments.shares_start
        assert_moments_of(moments, states_of(corpus, layout_id=layout_id, split=split), names)


def refuse_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a shard is read")

    monkeypatch.setattr(Corpus, "view", refuse)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_manifest_holds_the_moments_of_every_split(
    corpus: Corpus, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_moments_of_split(corpus, split)
    refuse_reading(monkeypatch)
    assert len(tensor_moments(Corpus.open(corpus.location), split)) == 2


def test_corpora_made_of_others_keep_them(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derived = write_corpus(str(tmp_path / "c"), [Selection(corpus=corpus, facts=corpus.facts.slice(2))], {})
    described = describe(derived.location, [], {derived.networks[key].name: {"name": "x"} for key in derived.networks})
    assert_moments_of_split(described, "train")
    refuse_reading(monkeypatch)
    assert len(tensor_moments(described, "heldout")) == 2


@pytest.mark.parametrize("bytes_at_once", [1, 1 << 24])
@pytest.mark.parametrize("columns", [5, 1 << 18])
def test_a_pass_over_the_shards_gives_the_same(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, bytes_at_once: int, columns: int
) -> None:
    monkeypatch.setattr(moments_module, "_BYTES_AT_ONCE", bytes_at_once)
    monkeypatch.setattr(moments_module, "_COLUMNS_AT_ONCE", columns)
    terms = ["checkpoint_id!=n00", "checkpoint_id!=n05"]
    for layout_id, moments in tensor_moments(corpus, "train", terms).items():
        facts = corpus.query(["split=train", f"layout_id={layout_id}", *terms])
        states = [corpus.state_dict(name.as_py()) for name in facts["checkpoint_id"]]
        assert_moments_of(moments, states, [spec.name for spec in corpus.layout(layout_id).generated])


def test_a_corpus_of_an_earlier_version_is_read_once(corpus: Corpus, tmp_path: Path) -> None:
    for path in Path(corpus.location).rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(corpus.location)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["checksum"]
    for sums in manifest["statistics"].values():
        del sums["splits"], sums["logs"]
    (tmp_path / "manifest.json").write_text(sealed_json(manifest))
    old = Corpus.open(tmp_path)
    assert old.moments(next(iter(old.networks))) == corpus.moments(next(iter(old.networks)))
    assert_moments_of_split(old, "train")


def test_spreads_are_about_the_shared_start(tmp_path: Path) -> None:
    start = network(99)
    states = {f"n{i}": {name: t + network(i)[name] for name, t in start.items()} for i in range(5)}
    shards = [builders.shard(tmp_path, "a", states), builders.shard(tmp_path, "b", {"s": start}, split="base")]
    corpus = builders.commit(tmp_path, shards, [builders.Layout.from_state_dict(start)])
    (found,) = tensor_moments(corpus).values()
    (layout_id,) = corpus.networks
    normalizer = Normalizer.measure(
        corpus.layout(layout_id), corpus.values(corpus.select(split="train")), corpus.base_values(layout_id)
    )
    assert found.shares_start
    torch.testing.assert_close(found.spread_N.float(), normalizer.scale_N, rtol=1e-5, atol=1e-7)
    for index, spec in enumerate(corpus.layout(layout_id).generated):
        values = torch.stack([seen(state, spec.name) for state in states.values()])
        assert found.mean_N[index] == pytest.approx(float(values.mean()), rel=1e-6)


def test_no_network_is_refused(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="has no network of split unseen; see `raywgen corpus info`"):
        tensor_moments(corpus, "unseen")
