from __future__ import annotations

import pytest
import torch

from raywgen.tasks.base import TaskError
from raywgen.tasks.image_classes import class_subset
from raywgen.tasks.images import ImageData, load_digits_images


def test_a_subset_holds_its_classes_alone_renumbered_in_the_order_given() -> None:
    data = load_digits_images()
    part = class_subset(data, [7, 1, 4])
    rows = [row for row, digit in enumerate(data.y_S.tolist()) if digit in (7, 1, 4)]
    assert torch.equal(part.x_SCHW, data.x_SCHW[rows])
    assert part.y_S.tolist() == [{7: 0, 1: 1, 4: 2}[int(data.y_S[row])] for row in rows]
    assert part.y_S.dtype == torch.int64
    assert part.class_names == ("7", "1", "4")
    assert (part.name, part.source, part.licence) == ("digits/7-1-4", data.source, data.licence)


def test_columns_and_empty_classes() -> None:
    data = ImageData(
        name="d",
        x_SCHW=torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1),
        y_S=torch.tensor([2, 0, 2, 0]),
        class_names=("a", "b", "c"),
        columns={"drawer": (1, 2, 3, 4)},
        source="test",
    )
    assert class_subset(data, [2]).columns == {"drawer": (1, 3)}
    assert class_subset(data, [2]).x_SCHW.flatten().tolist() == [0, 2]
    with pytest.raises(TaskError, match="class 'b' of 'd' has no images"):
        class_subset(data, [0, 1])


@pytest.mark.parametrize("classes", [[], [1, 1], [10], [-1, 2]])
def test_classes_that_are_not_of_the_data_are_refused(classes: list[int]) -> None:
    with pytest.raises(TaskError, match="give different classes from 0 to 9 of 'digits'"):
        class_subset(load_digits_images(), classes)
