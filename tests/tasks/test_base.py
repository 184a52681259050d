"""Labelled samples drawn from tasks by keyed noise.

Every sample of these tasks is its own number, so that a test sees which were drawn.
Shape legend: B tasks, S samples, C classes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.tasks import Inputs, Task, TaskError, draw_condition, draw_few_shot
from raywgen.tasks.base import draw_disjoint
from tests.builders import noise_for

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TASKS, NUM_SAMPLES, NUM_CLASSES = 5, 24, 3


def task(place: int, counts: tuple[int, ...]) -> Task:
    """A task whose classes have so many training samples, in an order of its own."""
    labels_S = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order_S = torch.randperm(len(labels_S), generator=torch.Generator().manual_seed(place))
    numbers_S1 = (1000.0 * place + torch.arange(len(labels_S))).unsqueeze(1)
    return Task(
        id=f"task/{place}",
        instruction=f"Task {place}?",
        recipe={},
        train_inputs=Inputs(numbers_S1),
        train_y_S=labels_S[order_S],
        test_inputs=Inputs(numbers_S1 + 500),
        test_y_S=labels_S[order_S],
        num_classes=len(counts),
    )


def tasks(num: int = NUM_TASKS) -> list[Task]:
    """Equally many samples; classes of five to eleven."""
    return [task(place, ((5, 8, 11), (8, 8, 8), (11, 6, 7))[place % 3]) for place in range(num)]


@given(shot=st.integers(1, 4), num_query=st.integers(1, 40), seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_support_has_as_many_of_each_class_and_the_query_none_of_it(shot: int, num_query: int, seed: int) -> None:
    drawn_from = tasks()
    support, query = draw_few_shot(drawn_from, shot, num_query, noise_for(NUM_TASKS, seed))
    assert support.samples_BSF.shape == (NUM_TASKS, shot * NUM_CLASSES, 1)
    assert query.samples_BSF.shape == (NUM_TASKS, num_query, 1)
    for part in (support, query):
        assert part.instructions == tuple(each.instruction for each in drawn_from)
        for b, each in enumerate(drawn_from):
            place_S = (part.samples_BSF[b, :, 0] - 1000 * b).long()
            assert torch.equal(each.train_y_S[place_S], part.labels_BS[b])
    expected_S = torch.arange(NUM_CLASSES).repeat_interleave(shot)
    assert torch.equal(support.labels_BS, expected_S.expand(NUM_TASKS, -1))
    for b in range(NUM_TASKS):
        shown = support.samples_BSF[b, :, 0].tolist()
        assert len(set(shown)) == len(shown)
        assert not set(shown) & set(query.samples_BSF[b, :, 0].tolist())


@given(num=st.integers(1, 12), num_workers=st.integers(1, 4), seed=st.integers(0, 2**20))
@settings(max_examples=15)
def test_a_tasks_samples_do_not_depend_on_how_a_batch_is_split(num: int, num_workers: int, seed: int) -> None:
    drawn_from = tasks(num)
    whole = draw_few_shot(drawn_from, 2, 7, noise_for(num, seed))
    again = draw_few_shot(drawn_from, 2, 7, noise_for(num, seed))
    for mine, theirs in zip(whole, again, strict=True):
        assert torch.equal(mine.samples_BSF, theirs.samples_BSF)
    for rank in range(min(num_workers, num)):
        places = list(range(rank, num, num_workers))
        noise = type(noise_for(1))(seed, torch.tensor(places))
        part = draw_few_shot([drawn_from[b] for b in places], 2, 7, noise)
        for mine, theirs in zip(part, whole, strict=True):
            assert torch.equal(mine.samples_BSF, theirs.samples_BSF[places])
            assert torch.equal(mine.labels_BS, theirs.labels_BS[places])


def test_every_sample_of_a_class_is_shown_and_asked_as_often_as_another() -> None:
    num, shot, num_query = 8000, 2, 3
    support, query = draw_few_shot([task(0, (5, 8, 11))] * num, shot, num_query, noise_for(num))
    shown_S = support.samples_BSF.flatten().long().bincount(minlength=NUM_SAMPLES).double()
    asked_S = query.samples_BSF.flatten().long().bincount(minlength=NUM_SAMPLES).double()
    labels_S = task(0, (5, 8, 11)).train_y_S
    for c, count in enumerate((5, 8, 11)):
        probability = shot / count
        # Binomial counts; five standard deviations.
        spread = (num * probability * (1 - probability)) ** 0.5
        assert bool(((shown_S[labels_S == c] - num * probability).abs() < 5 * spread).all())
        expected = num * num_query * (1 - probability) / (NUM_SAMPLES - shot * NUM_CLASSES)
        assert bool(((asked_S[labels_S == c] - expected).abs() < 5 * expected**0.5).all())


def test_other_seeds_draw_other_samples() -> None:
    first, second = (draw_few_shot(tasks(), 2, 7, noise_for(NUM_TASKS, seed)) for seed in (0, 1))
    assert not torch.equal(first[0].samples_BSF, second[0].samples_BSF)
    assert not torch.equal(first[1].samples_BSF, second[1].samples_BSF)


@pytest.mark.parametrize(("counts", "left"), [((5, 4, 3), 3), ((8, 2, 2), 2), ((6, 6, 0), 0)])
def test_too_few_samples_of_a_class_are_told_with_the_task(counts: tuple[int, ...], left: int) -> None:
    with pytest.raises(TaskError, match=rf"shot=3: task 'task/1' has {left} training samples of a class"):
        draw_few_shot([task(0, (4, 4, 4)), task(1, counts)], 3, 5, noise_for(2))


def test_conditions_are_drawn_from_tasks_of_any_size() -> None:
    drawn_from = [task(0, (1, 1)), task(1, (30, 20))]
    condition = draw_condition(drawn_from, 400, noise_for(2))
    assert set(condition.samples_BSF[0, :, 0].tolist()) == {0.0, 1.0}
    # Each of fifty is left out of 400 draws with a chance of 3e-4.
    assert len(set(condition.samples_BSF[1, :, 0].tolist())) >= 49
    for b, each in enumerate(drawn_from):
        place_S = (condition.samples_BSF[b, :, 0] - 1000 * b).long()
        assert torch.equal(each.train_y_S[place_S], condition.labels_BS[b])


@given(num_support=st.integers(1, 10), num_query=st.integers(1, 10), seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_no_sample_is_drawn_twice_for_support_and_query(num_support: int, num_query: int, seed: int) -> None:
    drawn_from = [task(0, (10, 10)), task(1, (30, 20))]
    support, query = draw_disjoint(drawn_from, num_support, num_query, noise_for(2, seed))
    for b, each in enumerate(drawn_from):
        place_S = (torch.cat([support.samples_BSF[b, :, 0], query.samples_BSF[b, :, 0]]) - 1000 * b).long()
        assert len(set(place_S.tolist())) == num_support + num_query
        assert torch.equal(each.train_y_S[place_S], torch.cat([support.labels_BS[b], query.labels_BS[b]]))


def test_each_sample_is_as_often_of_a_disjoint_set_as_another() -> None:
    num = 8000
    for part, size in zip(draw_disjoint([task(0, (5, 8, 11))] * num, 4, 9, noise_for(num)), (4, 9), strict=True):
        count_S = part.samples_BSF.flatten().long().bincount(minlength=NUM_SAMPLES).double()
        probability = size / NUM_SAMPLES
        spread = (num * probability * (1 - probability)) ** 0.5
        assert bool(((count_S - num * probability).abs() < 5 * spread).all())


def test_too_few_samples_for_disjoint_sets_are_told_with_the_task() -> None:
    with pytest.raises(TaskError, match=r"'task/1' has 7 training samples, and 4 .* with 4 others .* need 8"):
        draw_disjoint([task(0, (4, 4)), task(1, (4, 3))], 4, 4, noise_for(2))


@pytest.mark.parametrize("num_own", [0, 2])
def test_samples_drawn_from_what_tasks_share_are_those_of_tasks_with_copies(num_own: int) -> None:
    """With some tasks that share nothing beside them, too."""
    generator = torch.Generator().manual_seed(0)
    shared_XF = torch.randn(90, 7, generator=generator)
    parts = [Inputs(shared_XF, torch.randperm(90, generator=generator)[:NUM_SAMPLES]) for _ in range(NUM_TASKS)]
    copies = [replace(each, train_inputs=Inputs(part[:])) for each, part in zip(tasks(), parts, strict=True)]
    sharing = [replace(each, train_inputs=part) for each, part in zip(copies, parts, strict=True)]
    sharing[:num_own] = copies[:num_own]
    for mine, theirs in zip(
        (*draw_few_shot(sharing, 2, 9, noise_for(NUM_TASKS)), draw_condition(sharing, 30, noise_for(NUM_TASKS))),
        (*draw_few_shot(copies, 2, 9, noise_for(NUM_TASKS)), draw_condition(copies, 30, noise_for(NUM_TASKS))),
        strict=True,
    ):
        assert torch.equal(mine.samples_BSF, theirs.samples_BSF)
        assert torch.equal(mine.labels_BS, theirs.labels_BS)


def test_tasks_of_other_sizes_are_refused_with_the_remedy() -> None:
    with pytest.raises(TaskError, match=r"24 to 25 training samples.*tasks\.limit"):
        draw_few_shot([task(0, (8, 8, 8)), task(1, (9, 8, 8))], 1, 4, noise_for(2))
