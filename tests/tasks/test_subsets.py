from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raywgen.tasks.base import TaskError
from raywgen.tasks.subsets import balanced_rows, draw_groups, draw_subsets


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_drawn_subsets_are_distinct_sets_of_the_size_asked(data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(1, 60))
    size = data.draw(st.integers(1, num_classes))
    num = data.draw(st.integers(0, min(50, math.comb(num_classes, size))))
    seed = data.draw(st.integers(0, 2**32))
    subsets = draw_subsets(num_classes, size, num, seed)
    assert len(set(subsets)) == len(subsets) == num
    for subset in subsets:
        assert len(subset) == size
        assert list(subset) == sorted(set(subset))
        assert 0 <= subset[0] <= subset[-1] < num_classes
    assert draw_subsets(num_classes, size, num, seed) == subsets
    assert draw_subsets(num_classes, size, num // 2, seed) == subsets[: num // 2]


@pytest.mark.parametrize(("num_classes", "size"), [(1, 1), (6, 1), (7, 3), (8, 8), (9, 5)])
def test_all_subsets_can_be_drawn(num_classes: int, size: int) -> None:
    every = list(itertools.combinations(range(num_classes), size))
    assert sorted(draw_subsets(num_classes, size, len(every), seed=3)) == every
    with pytest.raises(TaskError, match=f"there are {len(every)} sets of {size} of {num_classes}"):
        draw_subsets(num_classes, size, len(every) + 1, seed=3)


def test_subsets_are_drawn_equally_often() -> None:
    drawn = Counter(subset for seed in range(2000) for subset in draw_subsets(5, 2, 2, seed))
    # 400 of each of the 10 sets expected, with a standard deviation of 18.
    assert len(drawn) == 10
    assert all(abs(count - 400) < 90 for count in drawn.values())


@pytest.mark.parametrize(("size", "num"), [(0, 1), (6, 1), (-1, 1), (2, -1)])
def test_sizes_that_make_no_subset_are_refused(size: int, num: int) -> None:
    with pytest.raises(TaskError, match=f"num={num}"):
        draw_subsets(5, size, num, seed=0)


@settings(deadline=None, max_examples=100)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), limit=st.integers(1, 100), seed=st.integers(0, 2**32)
)
@example(labels=[0] * 9 + [1] * 9 + [2], limit=7, seed=0)
def test_balanced_rows_take_of_each_class_what_it_has(labels: list[int], limit: int, seed: int) -> None:
    rows = balanced_rows(np.asarray(labels, dtype=np.int64), limit, seed).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == min(limit, len(labels))
    there, taken = Counter(labels), Counter(labels[row] for row in rows)
    unfinished = [taken[label] for label in there if taken[label] < there[label]]
    assert all(max(taken.values()) - count <= 1 for count in unfinished)
    assert balanced_rows(np.asarray(labels, dtype=np.int64), limit, seed).tolist() == rows


def test_groups_are_all_pairs_of_disjoint_sets_at_most_once() -> None:
    drawn = draw_groups([0, 1, 3, 4, 5], 90, seed=0)
    assert len(set(drawn)) == 90
    for first, second in drawn:
        assert first
        assert second
        assert not {*first} & {*second}
        assert {*first, *second} <= {0, 1, 3, 4, 5}
        assert first < second
    assert draw_groups([0, 1, 3, 4, 5], 30, seed=0) != draw_groups([0, 1, 3, 4, 5], 30, seed=1)
    with pytest.raises(TaskError, match="there are 90 pairs of sets of 5 classes"):
        draw_groups([0, 1, 3, 4, 5], 91, seed=0)


def test_groups_may_be_made_to_contain_a_class() -> None:
    with_it = {pair for pair in draw_groups(range(5), 90, seed=0) if 3 in {*pair[0], *pair[1]}}
    assert set(draw_groups(range(5), len(with_it), seed=1, containing=[3])) == with_it
    with pytest.raises(TaskError, match=f"there are {len(with_it)} pairs"):
        draw_groups(range(5), len(with_it) + 1, seed=1, containing=[3])


def test_groups_of_many_classes_are_drawn_without_listing_all() -> None:
    drawn = draw_groups(range(77), 50, seed=0)
    assert len(set(drawn)) == 50
    sizes = [len(side) for pair in drawn for side in pair]
    assert 20 < sum(sizes) / len(sizes) < 32, "each class lies in one of two sets, or in neither, with equal odds"
