"""Corpora of tokens: encoded once, read in windows, refused where they do not fit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen.config import ConfigError, load_config
from raywgen.corpus import Corpus, CorpusError, DamagedFileError
from raywgen.corpus.derive import Selection, write_corpus
from raywgen.corpus.tokens import TokenCorpus, TokensError, pack_codes, token_layout
from raywgen.generators import Generator
from raywgen.generators.bundle import BundleError, build_generator, save_bundle
from raywgen.generators.igpg import IGPG
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.training import TrainConfig, encode, launch, read_metrics
from raywgen.training.batch_plan import StageView
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.encode import EncodePlan
from raywgen.training.encode_corpus import EncodeConfig, encode_corpus
from raywgen.training.launcher import _differences
from raywgen.training.rows import RunRows
from raywgen.training.run_tokens import make_tokens, open_tokens
from raywgen.weights import Windows
from tests.builders import hypernetwork, igpg_config
from tests.training.whole_plan import WholePlan

pytestmark = pytest.mark.usefixtures("one_thread")


def generator_of(corpus: Corpus, window: int = 4, tokens: str = "none", **tokenizer: Any) -> IGPG:
    """Returns a generator whose tokeniser has codebooks of the corpus."""
    config = igpg_config()
    quantiser = QuantiserConfig(num_levels=2, num_codes=32)
    config.tokenizer = replace(config.tokenizer, **{"quantiser": quantiser, **tokenizer})
    config.prior = replace(config.prior, window=window, tokens=tokens)
    generator = build_generator("igpg", config, measure_normalizers(corpus), data_spec(corpus), 0)
    assert isinstance(generator, IGPG)
    plan = WholePlan(RunRows.of(corpus).train, seed=0, num_condition_samples=1, num_query_samples=1)
    generator.stages()[0].setup([plan.batch(step, 16) for step in range(2)], 0)
    return generator


@pytest.fixture(scope="module")
def generator(zoo_corpus: Corpus) -> IGPG:
    return generator_of(zoo_corpus)


@pytest.fixture(scope="module")
def bundle(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(generator, folder, {})
    return folder


@pytest.fixture(scope="module")
def tokens(zoo_corpus: Corpus, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return encode_corpus(config(zoo_corpus, bundle, tmp_path_factory.mktemp("tokens")))


def config(corpus: Corpus, bundle: Path, out: Path, **settings: Any) -> EncodeConfig:
    return EncodeConfig(corpus=corpus.location, tokenizer=str(bundle), out=str(out), **{"where": "here", **settings})


def expected(corpus: Corpus, generator: IGPG) -> Iterator[tuple[str, list[str], Tensor]]:
    """Yields for each layout the ids of its checkpoints, and the tokens of their whole networks."""
    for layout_id, network in corpus.networks.items():
        facts = corpus.select(layout_id=layout_id)
        codes_NML = generator.tokens(corpus.values(facts), network.layout)
        assert len(codes_NML.unique()) > 3
        yield layout_id, facts.column("checkpoint_id").to_pylist(), codes_NML


def test_tokens_are_those_of_whole_networks_and_windows_are_parts_of_them(
    zoo_corpus: Corpus, generator: IGPG, tokens: TokenCorpus
) -> None:
    assert tokens.corpus.facts.column("checkpoint_id") == zoo_corpus.facts.column("checkpoint_id")
    assert tokens.corpus.facts.column("split") == zoo_corpus.facts.column("split")
    for layout_id, ids, codes_NML in expected(zoo_corpus, generator):
        stored = tokens.of(layout_id, ids[::-1])
        index_B = torch.tensor([3, 0, len(ids) - 1, 3])
        assert torch.equal(stored.codes(index_B), codes_NML.flip(0)[index_B])
        last = stored.num_chunks - 4
        first_B = torch.tensor([0, 1, last, last - 1])
        windows_BWL = torch.stack([codes_NML.flip(0)[i, f : f + 4] for i, f in zip(index_B, first_B, strict=True)])
        assert torch.equal(stored.codes(index_B, first_B.unsqueeze(1) + torch.arange(4)), windows_BWL)
        scattered = [0, 1, last, last + 2, last + 3, last + 3]
        assert torch.equal(
            stored.codes(index_B, torch.tensor(scattered).expand(4, -1)), codes_NML.flip(0)[index_B][:, scattered]
        )


def test_tokens_of_many_codes_take_two_bytes() -> None:
    layout = token_layout("some", 5, 3, 300)
    codes_BWL = torch.arange(2 * 5 * 3).reshape(2, 5, 3) * 10
    packed_NP = torch.zeros(2, layout.num_bytes, dtype=torch.uint8)
    for first in (0, 3):
        pack_codes(packed_NP, layout, torch.arange(2), first, codes_BWL[:, first : first + 3])
    (stored,) = layout.unpack(packed_NP).values()
    assert torch.equal(stored.long(), codes_BWL)
    with pytest.raises(TokensError, match="num_codes=70000: tokens are stored of at most 65,536 codes"):
        token_layout("some", 5, 3, 70_000)


@pytest.mark.parametrize("scales", ["normalizer", "tensor", "filter"])
def test_blocks_hold_few_values_and_change_nothing(
    zoo_corpus: Corpus, tmp_path: Path, scales: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, seen = generator_of(zoo_corpus, scales=scales), []
    monkeypatch.setattr(encode, "_VALUES_AT_ONCE", 64)
    plan = EncodePlan(zoo_corpus, generator.token_encoder(), str(tmp_path))
    inner = plan.encoder.encode

    def watched(values_BX: Tensor, layout: Any, windows: Windows | None, moments_BN: Tensor | None) -> Tensor:
        seen.append(values_BX.numel())
        return inner(values_BX, layout, windows, moments_BN)

    monkeypatch.setattr(plan.encoder, "encode", watched)
    for item in plan.items:
        plan.encode(item)
    tokens = plan.commit()
    assert max(seen) <= 64
    for layout_id, ids, codes_NML in expected(zoo_corpus, generator):
        assert torch.equal(tokens.of(layout_id, ids).codes(torch.arange(len(ids))), codes_NML)


@pytest.mark.parametrize("window", [0, 4])
def test_a_prior_learns_from_tokens_what_it_learns_from_weights(
    zoo_corpus: Corpus, tokens: TokenCorpus, window: int
) -> None:
    generator = generator_of(zoo_corpus, window=window, tokens="auto")
    stage = generator.stages()[1]
    rows = RunRows.of(zoo_corpus)
    for part, other in ((rows.train, rows.with_tokens(tokens).train), (rows.held, rows.with_tokens(tokens).held)):
        plans = [WholePlan(each, seed=3, num_condition_samples=5, num_query_samples=7) for each in (part, other)]
        for step in range(4):
            found = []
            for plan in plans:
                batch, noise = plan.for_stage(step, 8, StageView(stage, 0, 5))
                assert (batch.codes_BWL is None) == (batch.values_BD.numel() > 0) == (plan is plans[0])
                found.append(stage(batch, noise).loss)
            assert torch.equal(*found)


def test_an_interrupted_encoding_goes_on_where_it_stopped(
    zoo_corpus: Corpus, bundle: Path, tokens: TokenCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = EncodePlan.encode

    def killed(self: EncodePlan, item: Any, on_share: Any = None) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        real(self, item, on_share)
        done.append(item.name)

    monkeypatch.setattr(EncodePlan, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(config(zoo_corpus, bundle, tmp_path))
    with pytest.raises(CorpusError, match=r"holds no manifest\.json"):
        TokenCorpus.open(tmp_path)
    (tmp_path / "weights" / "half.arrow.123.partial").write_bytes(b"half")
    again: list[str] = []
    monkeypatch.setattr(EncodePlan, "encode", lambda self, item, on_share: (real(self, item), again.append(item.name)))
    progress: list[tuple[int, int]] = []
    found = encode_corpus(config(zoo_corpus, bundle, tmp_path), lambda *now: progress.append(now))
    assert len(again) == len(zoo_corpus.shards) - 3
    assert not set(done) & set(again)
    assert 0 < progress[0][0] < progress[-1][0] == progress[-1][1]
    files = {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    assert files == {path.name: path.read_bytes() for path in Path(tokens.location, "weights").iterdir()}
    assert not (tmp_path / "units").exists()
    encode_corpus(config(zoo_corpus, bundle, tmp_path))
    assert found.recipe == tokens.recipe
    assert len(again) == len(zoo_corpus.shards) - 3, "finished tokens are reused"


def test_workers_of_a_run_share_the_shards(zoo_corpus: Corpus, generator: IGPG, tmp_path: Path) -> None:
    found: dict[int, TokenCorpus | None] = {}

    def work(rank: int) -> None:
        corpus = Corpus.open(zoo_corpus.location)
        found[rank] = make_tokens(
            tmp_path, corpus, generator, rank=rank, num_workers=3, asked_to_stop=lambda: len(found) > 3
        )

    # The first worker begins last: the others wait for it.
    threads = [threading.Thread(target=work, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(3):
        tokens = found[rank]
        assert tokens is not None
        for layout_id, ids, codes_NML in expected(zoo_corpus, generator):
            assert torch.equal(tokens.of(layout_id, ids).codes(torch.arange(len(ids))), codes_NML)


def test_a_worker_that_waits_stops_when_asked(zoo_corpus: Corpus, generator: IGPG, tmp_path: Path) -> None:
    asked = iter([False] * (len(zoo_corpus.shards) // 2 + 1))
    stop = lambda: next(asked, True)  # noqa: E731
    assert make_tokens(tmp_path, zoo_corpus, generator, rank=1, num_workers=2, asked_to_stop=stop) is None
    assert not (tmp_path / "tokens" / "manifest.json").exists()


def test_tokens_of_an_earlier_tokeniser_are_made_anew(
    zoo_corpus: Corpus, generator: IGPG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(by: IGPG) -> TokenCorpus:
        tokens = make_tokens(tmp_path, zoo_corpus, by, rank=0, num_workers=1, asked_to_stop=lambda: False)
        assert tokens is not None
        return tokens

    other = generator_of(zoo_corpus, chunk_length=4)
    assert made(other).recipe.chunk_length == 4
    tokens = made(generator)
    assert open_tokens(tokens.location, zoo_corpus, generator).recipe.chunk_length == 8
    monkeypatch.setattr(EncodePlan, "encode", None)
    assert made(generator).recipe == tokens.recipe


def test_tokens_that_do_not_fit_are_refused_in_one_line(
    zoo_corpus: Corpus, generator: IGPG, bundle: Path, tokens: TokenCorpus, tmp_path: Path
) -> None:
    another = generator_of(zoo_corpus, width=24)
    with pytest.raises(TokensError, match="tokens of another tokeniser than the one that was trained here; make them"):
        open_tokens(tokens.location, zoo_corpus, another)
    part = [Selection(corpus=zoo_corpus, facts=zoo_corpus.query(["step=120"]))]
    changed = write_corpus(str(tmp_path / "changed"), part, {"filter": []})
    with pytest.raises(TokensError, match=r"tokens of other checkpoints than .*changed does now .*; make them again"):
        open_tokens(tokens.location, changed, generator)
    with pytest.raises(TokensError, match=r"tokens of other checkpoints than .*changed does now"):
        launch([run(changed, tmp_path / "run", tokens.location)])
    with pytest.raises(CorpusError, match="holds tokens, not weights; train on the corpus of weights"):
        launch([run(tokens.corpus, tmp_path / "run", "none")])
    with pytest.raises(TokensError, match="holds weights and no tokens"):
        launch([run(zoo_corpus, tmp_path / "run", changed.location)])
    with pytest.raises(TokensError, match="lacks the tokens of checkpoint 'nobody'"):
        tokens.of(zoo_corpus.shards[0].layout_id, ["nobody"])
    with pytest.raises(TokensError, match="holds tokens already; give the corpus of weights"):
        encode_corpus(config(tokens.corpus, bundle, tmp_path / "twice"))
    with pytest.raises(TokensError, match="already holds tokens of another tokeniser or other checkpoints"):
        encode_corpus(config(changed, bundle, Path(tokens.location)))
    with pytest.raises(TokensError, match="already holds a corpus of weights"):
        encode_corpus(config(zoo_corpus, bundle, Path(changed.location)))


def test_a_tokeniser_must_be_there_and_fit_the_corpus(zoo_corpus: Corpus, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="holds no trained tokeniser; give the folder of a run whose first stage"):
        encode_corpus(config(zoo_corpus, tmp_path, tmp_path / "out"))
    save_bundle(hypernetwork(), tmp_path / "hyper", {})
    with pytest.raises(TokensError, match="a generator of method 'hypernetwork', which has no tokens"):
        encode_corpus(config(zoo_corpus, tmp_path / "hyper", tmp_path / "out"))
    normalizers = measure_normalizers(zoo_corpus)
    (first, *_), table = normalizers, dict(list(normalizers.items())[1:])
    save_bundle(build_generator("igpg", igpg_config(), table, data_spec(zoo_corpus), 0), tmp_path / "part", {})
    with pytest.raises(TokensError, match=f"was not trained on networks like those of .* layout_id!={first}"):
        encode_corpus(config(zoo_corpus, tmp_path / "part", tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_damaged_tokens_are_refused(zoo_corpus: Corpus, bundle: Path, tmp_path: Path) -> None:
    tokens = encode_corpus(config(zoo_corpus, bundle, tmp_path))
    shard = next(shard for shard in tokens.corpus.shards if "train" in shard.path)
    path, layout_id = (
        tmp_path / shard.path,
        next(key for key, value in tokens.recipe.layouts.items() if value == shard.layout_id),
    )
    ids = tokens.corpus.facts.filter(tokens.corpus.facts.column("shard").to_numpy() == shard.path)
    stored = tokens.of(layout_id, ids.column("checkpoint_id").to_pylist())
    codes_BWL = stored.codes(torch.arange(2))
    content = path.read_bytes()
    place = content.index(bytes(codes_BWL[1].flatten().tolist()))
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    fresh = TokenCorpus.open(tmp_path).of(layout_id, ids.column("checkpoint_id").to_pylist())
    assert torch.equal(fresh.codes(torch.tensor([0])), codes_BWL[:1])
    with pytest.raises(DamagedFileError, match="has another checksum than its facts"):
        fresh.codes(torch.tensor([1]), torch.tensor([[2, 3, 4]]))
    path.write_bytes(content[:-8])
    with pytest.raises(DamagedFileError, match="the manifest says"):
        TokenCorpus.open(tmp_path)


def run(corpus: Corpus, out: Path, tokens: str) -> TrainConfig:
    igpg = igpg_config()
    igpg.prior = replace(igpg.prior, window=4, tokens=tokens)
    igpg.task_loss = replace(igpg.task_loss, num_steps=0)
    settings: dict[str, Any] = {"num_workers": 0, "log_every": 1, "validate_every": 2, "checkpoint_every": 2}
    return TrainConfig(generator=igpg, corpus=corpus.location, out=str(out), **settings)


def rows(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("time", "perf")} for row in read_metrics(out)]


def test_a_run_makes_its_tokens_and_learns_the_same(zoo_corpus: Corpus, tmp_path: Path) -> None:
    launch([run(zoo_corpus, tmp_path / "weights", "none")])
    launch([run(zoo_corpus, tmp_path / "auto", "auto")])
    assert rows(tmp_path / "auto") == rows(tmp_path / "weights")
    tokens = TokenCorpus.open(tmp_path / "auto" / "tokens")
    other = encode_corpus(config(zoo_corpus, tmp_path / "weights", tmp_path / "tokens"))
    assert other.recipe.tokenizer == tokens.recipe.tokenizer
    # The folder is no part of what a run is: it may change when the run goes on, and a bundle does not know it.
    assert _differences(run(zoo_corpus, tmp_path / "weights", other.location)) == []
    launch([run(zoo_corpus, tmp_path / "stored", other.location)])
    assert rows(tmp_path / "stored") == rows(tmp_path / "weights")
    assert other.location not in (tmp_path / "stored" / "generator" / "generator.json").read_text()


@pytest.mark.parametrize("value", ["off", "''"])
def test_no_tokens_are_called_none(value: str) -> None:
    with pytest.raises(ConfigError, match="tokens: give none, auto, or the folder of a corpus of tokens"):
        load_config(TrainConfig, None, [f"generator.prior.tokens={value}"])


@pytest.mark.slow
def test_two_actors_encode_what_this_process_does(
    zoo_corpus: Corpus, bundle: Path, tokens: TokenCorpus, tmp_path: Path
) -> None:
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        found = encode_corpus(config(zoo_corpus, bundle, tmp_path, where="ray", num_actors=2))
    finally:
        ray.shutdown()
    assert found.recipe == tokens.recipe
    for shard in tokens.corpus.shards:
        assert (tmp_path / shard.path).read_bytes() == Path(tokens.location, shard.path).read_bytes()
