from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.tasks.base import TaskError
from raywgen.tasks.episodes import EpisodeSampler, class_groups, split_classes
from raywgen.tasks.images import ImageData, load_images

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
NUM_CLASSES, PER_CLASS = 7, 9


def numbered_images(counts: list[int]) -> ImageData:
    """Image r has the value r in its upper left corner and 255 - its class beside it, so that each names itself."""
    y_S = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    y_S = y_S[torch.randperm(len(y_S), generator=torch.Generator().manual_seed(0))]
    x_SCHW = torch.zeros(len(y_S), 1, 3, 3, dtype=torch.uint8)
    x_SCHW[:, 0, 0, 0] = torch.arange(len(y_S))
    x_SCHW[:, 0, 0, 1] = 255 - y_S
    names = tuple(f"c{number}" for number in range(len(counts)))
    return ImageData(name="numbered", x_SCHW=x_SCHW, y_S=y_S, class_names=names, source="test")


DATA = numbered_images([PER_CLASS] * NUM_CLASSES)


def rows_of(x_SCHW: torch.Tensor) -> list[int]:
    return x_SCHW[:, 0, 0, 0].tolist()


@settings(deadline=None, max_examples=80)
@given(
    way=st.integers(1, NUM_CLASSES),
    shot=st.integers(1, 5),
    num_query=st.integers(1, 4),
    seed=st.integers(-(2**63), 2**63),
    index=st.integers(0, 2**64 - 1),
)
def test_an_episode_is_balanced_disjoint_and_repeatable(
    way: int, shot: int, num_query: int, seed: int, index: int
) -> None:
    episode = EpisodeSampler(DATA, range(NUM_CLASSES), way=way, shot=shot, num_query=num_query, seed=seed).episode(
        index
    )
    support, query = rows_of(episode.support_x), rows_of(episode.query_x)
    assert len(set(support) | set(query)) == way * (shot + num_query)
    assert Counter(episode.support_y.tolist()) == dict.fromkeys(range(way), shot)
    assert Counter(episode.query_y.tolist()) == dict.fromkeys(range(way), num_query)
    assert len(set(episode.classes.tolist())) == way
    for rows, labels in ((support, episode.support_y), (query, episode.query_y)):
        assert torch.equal(DATA.y_S[rows], episode.classes[labels])
        assert torch.equal(DATA.x_SCHW[rows], episode.support_x if rows is support else episode.query_x)
    again = EpisodeSampler(DATA, range(NUM_CLASSES), way=way, shot=shot, num_query=num_query, seed=seed).episode(index)
    assert torch.equal(again.support_x, episode.support_x)
    assert torch.equal(again.query_x, episode.query_x)
    assert torch.equal(again.classes, episode.classes)


def test_episodes_differ_by_seed_and_by_index() -> None:
    drawn = set()
    for seed in range(6):
        sampler = EpisodeSampler(DATA, range(NUM_CLASSES), way=4, shot=3, num_query=3, seed=seed)
        drawn |= {tuple(rows_of(sampler.episode(index).support_x)) for index in range(40)}
    assert len(drawn) == 6 * 40


def test_every_class_and_image_is_drawn_equally_often() -> None:
    sampler = EpisodeSampler(DATA, [1, 2, 4, 6], way=2, shot=1, num_query=2, seed=5)
    episodes = [sampler.episode(index) for index in range(2000)]
    classes = Counter(number for episode in episodes for number in episode.classes.tolist())
    images = Counter(row for episode in episodes for row in rows_of(episode.support_x))
    assert set(classes) == {1, 2, 4, 6}
    # 1,000 of each class expected with a standard deviation of 22; 111 of each image with one of about 10.
    assert all(abs(count - 1000) < 110 for count in classes.values())
    assert len(images) == 4 * PER_CLASS
    assert all(abs(count - 4000 / 36) < 55 for count in images.values())


def test_a_batch_is_its_episodes() -> None:
    sampler = EpisodeSampler(DATA, range(NUM_CLASSES), way=3, shot=2, num_query=4, seed=1)
    batch = sampler.batch(first=10, num=5)
    assert batch.support_x.shape == (5, 6, 1, 3, 3)
    assert batch.query_y.shape == (5, 12)
    for place in range(5):
        episode = sampler.episode(10 + place)
        for name in ("support_x", "support_y", "query_x", "query_y", "classes"):
            assert torch.equal(getattr(batch, name)[place], getattr(episode, name))
    with pytest.raises(TaskError, match="num=0"):
        sampler.batch(0, 0)


def test_rotated_classes_are_classes_of_their_own() -> None:
    sampler = EpisodeSampler(DATA, [2, 5], way=8, shot=2, num_query=1, seed=0, rotations=True)
    episode = sampler.episode(3)
    assert sorted(episode.classes.tolist()) == sorted(c + 7 * turns for c in (2, 5) for turns in range(4))
    for x_SCHW, labels in ((episode.support_x, episode.support_y), (episode.query_x, episode.query_y)):
        for image, number in zip(x_SCHW, episode.classes[labels].tolist(), strict=True):
            upright = torch.rot90(image, -(number // 7), (-2, -1))
            row = int(upright[0, 0, 0])
            assert torch.equal(upright, DATA.x_SCHW[row])
            assert int(DATA.y_S[row]) == number % 7


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ([0, 1], {"way": 3}, "way=3: there are 2 classes"),
        ([0, 1], {"way": 9, "rotations": True}, "way=9: there are 8 classes"),
        ([0, 1, 2], {"shot": 2, "num_query": 3}, "class 'c2' of 'numbered' has 4 images, fewer than shot=2"),
        ([0, 0], {}, "give different ones from 0 to 2"),
        ([0, 3], {}, "give different ones from 0 to 2"),
        ([0, 1], {"shot": 0}, "shot=0"),
        ([0, 1], {"num_query": 0}, "num_query=0"),
    ],
)
def test_what_does_not_suffice_is_refused(classes: list[int], options: dict[str, Any], message: str) -> None:
    data = numbered_images([9, 9, 4])
    asked: dict[str, Any] = {"way": 2, "shot": 1, "num_query": 1, "seed": 0, **options}
    with pytest.raises(TaskError, match=message):
        EpisodeSampler(data, classes, **asked)


def test_oblong_images_do_not_turn() -> None:
    data = ImageData(
        name="oblong",
        x_SCHW=torch.zeros(4, 1, 2, 3, dtype=torch.uint8),
        y_S=torch.tensor([0, 0, 1, 1]),
        class_names=("a", "b"),
        source="test",
    )
    with pytest.raises(TaskError, match="images are 2x3; load square ones"):
        EpisodeSampler(data, [0, 1], way=2, shot=1, num_query=1, seed=0, rotations=True)
    sampler = EpisodeSampler(data, [0, 1], way=2, shot=1, num_query=1, seed=0)
    assert sampler.episode(0).query_x.shape == (2, 1, 2, 3)
    with pytest.raises(TaskError, match="index=-1"):
        sampler.episode(-1)


@settings(deadline=None, max_examples=100)
@given(
    groups=st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=60).filter(lambda g: len(set(g)) >= 3),
    weights=st.tuples(*[st.integers(1, 20)] * 3),
    seed=st.integers(0, 2**40),
)
def test_no_group_is_in_two_splits(groups: list[str], weights: tuple[int, int, int], seed: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    splits = split_classes(groups, shares, seed=seed)
    assert sorted(c for classes in splits.values() for c in classes) == list(range(len(groups)))
    held = {split: {groups[c] for c in classes} for split, classes in splits.items()}
    assert sum(map(len, held.values())) == len(set(groups))
    assert all(held.values())
    for share, found in zip(shares, held.values(), strict=True):
        # Within one of the exact share, but for a group that is owed to a split which would have none.
        assert len(found) - share * len(set(groups)) > -2
    assert split_classes(groups, shares, seed=seed) == splits


def test_shares_are_kept_and_depend_on_the_seed() -> None:
    names = [f"class-{number}" for number in range(50)]
    splits = split_classes(names, seed=1)
    assert {split: len(classes) for split, classes in splits.items()} == {"train": 30, "validation": 10, "test": 10}
    assert split_classes(names, seed=2) != splits
    assert split_classes(names, (0.5, 0.0, 0.5), seed=1)["validation"] == ()


@pytest.mark.parametrize(
    ("groups", "shares", "message"),
    [
        (["a", "b"], (0.6, 0.2, 0.2), "2 groups cannot fill 3 splits"),
        (["a"] * 30, (0.6, 0.2, 0.2), "1 groups cannot fill 3 splits"),
        (["a", "b", "c"], (0.6, 0.2, 0.3), "add up to 1"),
        (["a", "b", "c"], (1.2, -0.2, 0.0), "nothing negative"),
        (["a", "b", "c"], (0.5, 0.5), "give three"),
    ],
)
def test_splits_that_cannot_be_made_are_refused(groups: list[str], shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        split_classes(groups, shares, seed=0)


def test_groups_of_classes_need_one_value_a_class() -> None:
    data = ImageData(
        name="g",
        x_SCHW=torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
        y_S=torch.tensor([1, 0, 1]),
        class_names=("a", "b"),
        columns={"alphabet": ("x", "y", "x"), "drawer": (1, 2, 3)},
        source="test",
    )
    assert class_groups(data, "alphabet") == ("y", "x")
    with pytest.raises(TaskError, match="class 'b' has 'drawer' 1 and 3"):
        class_groups(data, "drawer")
    with pytest.raises(TaskError, match="no column 'language'; it has: alphabet, drawer"):
        class_groups(data, "language")


def test_real_alphabets_are_held_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = REAL_DATA / "omniglot-background.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    monkeypatch.setenv("RAYWGEN_CACHE", str(tmp_path))
    data = load_images(path, size=28)
    alphabets = class_groups(data, "alphabet")
    assert (len(alphabets), len(set(alphabets))) == (964, 30)
    splits = split_classes(alphabets, seed=0)
    held = {split: {alphabets[c] for c in classes} for split, classes in splits.items()}
    assert [len(found) for found in held.values()] == [18, 6, 6]
    sampler = EpisodeSampler(data, splits["test"], way=20, shot=5, num_query=15, seed=0, rotations=True)
    batch = sampler.batch(0, 8)
    assert batch.query_x.shape == (8, 300, 1, 28, 28)
    assert {alphabets[number % 964] for number in batch.classes.flatten().tolist()} <= held["test"]
