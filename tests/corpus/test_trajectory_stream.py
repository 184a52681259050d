from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raywgen.corpus import Corpus, CorpusError, Cursor, MixedStream
from raywgen.corpus.build import BuildConfig, build_corpus

STEPS = (0, 10, 20, 30, 45, 60, 100)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Five trajectories of seven states whose every value encodes run and step, and a longer one of another layout."""
    folder = tmp_path_factory.mktemp("runs")
    rows = ["path,trajectory_id,step,architecture"]
    for run in range(5):
        for step in STEPS:
            save_file({"w": torch.full((4, 3), run + step / 1000)}, folder / f"{run}-{step:03d}.safetensors")
            rows.append(f"{run}-{step:03d},run-{run},{step},small")
    for step in (*STEPS, 130):
        save_file({"w": torch.full((2, 9), 9 + step / 1000)}, folder / f"wide-{step:03d}.safetensors")
        rows.append(f"wide-{step:03d},run-wide,{step},wide")
    (folder / "facts.csv").write_text("\n".join(rows))
    out = str(tmp_path_factory.mktemp("corpus") / "c")
    return build_corpus(BuildConfig(out=out, sources=[str(folder)], facts=str(folder / "facts.csv"), distributed=False))


def small(corpus: Corpus, **settings: object) -> list[tuple[int, tuple[int, ...]]]:
    """Run and steps of every window of an epoch, read off the values themselves."""
    found = []
    for batch in corpus.windows(**({"batch_size": 4, "terms": ["architecture=small"]} | settings)).epoch():
        assert batch.values_BAD.shape[2] == 12
        assert bool((batch.values_BAD == batch.values_BAD[..., :1]).all())
        first_BA = batch.values_BAD[..., 0]
        run_B = first_BA.floor()[:, 0]
        steps_BA = ((first_BA - run_B[:, None]) * 1000).round().int()
        assert torch.equal(steps_BA, batch.step_BA.int())
        found += [(int(run), tuple(steps)) for run, steps in zip(run_B, steps_BA.tolist(), strict=True)]
    return found


def test_whole_trajectories_come_in_step_order(corpus: Corpus) -> None:
    assert sorted(small(corpus)) == [(run, STEPS) for run in range(5)]


def test_targets_are_evenly_spaced_and_hold_both_ends(corpus: Corpus) -> None:
    assert sorted(small(corpus, num_targets=2)) == [(run, (0, 45, 100)) for run in range(5)]
    assert sorted(small(corpus, num_targets=1)) == [(run, (0, 100)) for run in range(5)]


def test_every_sub_trajectory_comes_once(corpus: Corpus) -> None:
    expected = sorted((run, STEPS[i : i + 3]) for run in range(5) for i in range(len(STEPS) - 2))
    assert sorted(small(corpus, length=2)) == expected
    targets = (0, 30, 60, 100)
    assert sorted(small(corpus, num_targets=3, length=1)) == sorted(
        (run, targets[i : i + 2]) for run in range(5) for i in range(3)
    )


def test_queries_choose_steps(corpus: Corpus) -> None:
    terms = ["architecture=small", "step>=20", "step<=60"]
    assert sorted(small(corpus, terms=terms)) == [(run, (20, 30, 45, 60)) for run in range(5)]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_together_see_what_one_sees_in_the_same_order(corpus: Corpus, num_workers: int) -> None:
    def batches(rank: int, num: int) -> list[set[tuple[int, ...]]]:
        windows = corpus.windows(
            batch_size=4, length=2, terms=["architecture=small"], seed=5, rank=rank, num_workers=num
        )
        return [{tuple(row) for row in batch.checkpoint_BA.tolist()} for batch in windows.epoch()]

    parts = [batches(rank, num_workers) for rank in range(num_workers)]
    assert [set().union(*group) for group in zip(*parts, strict=True)] == batches(0, 1)


def test_what_cannot_be_cut_is_refused(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="trajectories of 2 layouts"):
        corpus.windows(batch_size=2)
    with pytest.raises(CorpusError, match="no trajectory with enough states for num_targets=50"):
        small(corpus, num_targets=50)
    with pytest.raises(CorpusError, match="both must be at least 1"):
        small(corpus, length=0)
    with pytest.raises(CorpusError, match="holds no checkpoint with architecture=none"):
        small(corpus, terms=["architecture=none"])


def test_trajectories_of_unequal_length_need_a_length(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="6 to 7 states; give num_targets or length"):
        small(corpus, terms=["architecture=small", "checkpoint_id!=0-100"])


def mixed(corpus: Corpus, prefetch: int) -> MixedStream:
    streams = [
        corpus.windows(batch_size=2, length=2, terms=[f"architecture={name}"], prefetch=prefetch)
        for name in ("small", "wide")
    ]
    return MixedStream(streams, weights=[3, 1], seed=7)


def test_mixing_follows_the_weights_and_goes_on_where_it_stopped(corpus: Corpus) -> None:
    def take(stream: MixedStream, num: int) -> list[tuple[int, list[list[int]]]]:
        return [(index, batch.checkpoint_BA.tolist()) for _, (index, batch) in zip(range(num), stream, strict=False)]

    expected = take(mixed(corpus, prefetch=0), 400)
    assert 260 < sum(index == 0 for index, _ in expected) < 340
    begun = mixed(corpus, prefetch=2)
    head = take(begun, 31)
    resumed = mixed(corpus, prefetch=2)
    resumed.go_to(begun.to_json())
    assert head + take(resumed, 60) == expected[:91]


def test_mixing_depends_on_its_own_seed(corpus: Corpus) -> None:
    def drawn(seed: int) -> list[int]:
        names = ("small", "wide")
        streams = [corpus.windows(batch_size=2, length=2, terms=[f"architecture={name}"]) for name in names]
        return [index for _, (index, _) in zip(range(40), MixedStream(streams, [1, 1], seed=seed), strict=False)]

    assert drawn(1) != drawn(2)


def test_a_mix_needs_a_weight_for_each(corpus: Corpus) -> None:
    stream = corpus.windows(batch_size=2, terms=["architecture=wide"], cursor=Cursor(epoch=1))
    for weights in ([], [1.0, 2.0], [0.0]):
        with pytest.raises(CorpusError, match="give each a positive weight"):
            MixedStream([stream], weights)


def test_a_corpus_without_trajectories_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "one.safetensors")
    alone = build_corpus(BuildConfig(out=str(tmp_path / "c"), sources=[str(tmp_path)], distributed=False))
    with pytest.raises(CorpusError, match="no trajectory with enough states"):
        alone.windows(batch_size=1)
