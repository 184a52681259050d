import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from raywgen.tasks import TaskError, digits_subset, draw_subset_tasks
from raywgen.tasks.digits import digit_images

FIRST_TRAIN_DIGITS = [9, 4, 1, 2, 4, 5, 6, 2, 2, 0, 2, 8]
FIRST_TEST_DIGITS = [1, 5, 4, 5, 9, 1, 8, 2, 9, 0, 6, 6]


def _bytes(x_SF: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in x_SF]


def test_the_split_holds_every_image_once() -> None:
    train_x, train_y, test_x, test_y = digit_images()
    assert (len(train_x), len(train_y), len(test_x), len(test_y)) == (1200, 1200, 597, 597)
    source = (load_digits(return_X_y=True)[0] / 16).astype(np.float32)
    # scikit-learn's digits contain no image twice, so equal multisets mean disjoint and complete parts.
    assert len({row.tobytes() for row in source}) == len(source)
    assert set(_bytes(train_x)).isdisjoint(_bytes(test_x))
    assert set(_bytes(train_x)) | set(_bytes(test_x)) == {row.tobytes() for row in source}


def test_the_split_is_fixed_and_stratified() -> None:
    train_x, train_y, _, test_y = digit_images()
    # First images of the split, written down once: a split that moves makes stored accuracies meaningless.
    assert train_y[:12].tolist() == FIRST_TRAIN_DIGITS
    assert test_y[:12].tolist() == FIRST_TEST_DIGITS
    whole = torch.bincount(torch.cat([train_y, test_y]), minlength=10)
    torch.testing.assert_close(torch.bincount(train_y).float(), whole * (1200 / 1797), rtol=0, atol=1.0)
    assert 0 <= train_x.min() < train_x.max() == 1


def test_a_subset_task_asks_for_its_labels() -> None:
    _, train_digits, _, test_digits = digit_images()
    task = digits_subset([7, 1, 4])
    assert task.id == "digits/1-4-7"
    assert task.instruction == "Is the digit one of 1, 4, 7?"
    assert task.num_classes == 2
    assert task.train_y_S.tolist() == [int(digit in (1, 4, 7)) for digit in train_digits.tolist()]
    assert task.test_y_S.tolist() == [int(digit in (1, 4, 7)) for digit in test_digits.tolist()]
    assert task.train_x_SF.dtype == torch.float32
    assert task.train_y_S.dtype == torch.int64


@pytest.mark.parametrize("labels", [[], [1, 1], [10], [-1, 2], list(range(10))])
def test_labels_that_make_no_question_are_refused(labels: list[int]) -> None:
    with pytest.raises(TaskError, match="between one and nine different digits"):
        digits_subset(labels)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    num_seen=st.integers(0, 500),
    num_validation=st.integers(0, 60),
    num_unseen=st.integers(0, 60),
)
def test_held_out_tasks_and_their_complements_are_in_no_other_split(
    seed: int, num_seen: int, num_validation: int, num_unseen: int
) -> None:
    drawn = draw_subset_tasks(num_seen=num_seen, num_validation=num_validation, num_unseen=num_unseen, seed=seed)
    subsets = {split: {frozenset(recipe["labels"]) for recipe in recipes} for split, recipes in drawn.items()}
    wanted = {"seen": num_seen, "validation": num_validation, "unseen": num_unseen}
    assert {split: len(found) for split, found in subsets.items()} == wanted
    assert all(2 <= len(subset) <= 8 for found in subsets.values() for subset in found)
    for held_out in ("validation", "unseen"):
        questions = subsets[held_out] | {frozenset(range(10)) - subset for subset in subsets[held_out]}
        for other in wanted:
            assert other == held_out or questions.isdisjoint(subsets[other])


def test_the_draw_depends_on_the_seed_alone() -> None:
    first, again, other = (draw_subset_tasks(num_seen=9, num_validation=2, num_unseen=3, seed=s) for s in (4, 4, 5))
    assert first == again
    assert first != other


def test_too_many_tasks_are_refused() -> None:
    with pytest.raises(TaskError, match=r"num_seen_tasks=1000: only 9.. of the 1002"):
        draw_subset_tasks(num_seen=1000, num_validation=8, num_unseen=8, seed=0)
