from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raywgen.tasks import TaskError, build_task
from raywgen.tasks.domains import apply_domain
from raywgen.tasks.image_tasks import network_inputs
from raywgen.tasks.images import load_digits_images
from raywgen.tasks.preprocessing import input_form

SHARED = Path(__file__).parents[2] / "../shared/data"


def test_a_task_of_all_classes_holds_a_fifth_out() -> None:
    task = build_task({"name": "images", "path": "digits"})
    assert task.num_classes == 10
    assert len(task.train_y_S) + len(task.test_y_S) == 1797
    assert len(task.test_y_S) == round(0.2 * 1797)
    train = {tuple(row) for row in task.train_x_SF.tolist()}
    assert not any(tuple(row) in train for row in task.test_x_SF.tolist())
    every = torch.cat([task.train_x_SF, task.test_x_SF])
    assert abs(float(every.mean())) < 1e-4
    assert float(every.std()) == pytest.approx(1, abs=1e-3)


def test_test_images_are_normalised_by_the_statistics_of_the_training_images(tmp_path: Path) -> None:
    """Test images twice as bright stay twice as bright."""
    for folder, brightness in (("train", 1), ("test", 2)):
        for label in ("a", "b"):
            (tmp_path / folder / label).mkdir(parents=True)
            for index in range(4):
                pixels = np.full((4, 4), brightness * (20 + 20 * index + 10 * (label == "b")), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / label / f"{index}.png")
    task = build_task({"name": "images", "path": str(tmp_path / "train"), "test_path": str(tmp_path / "test")})
    form = input_form(task.recipe)
    assert form is not None
    train, test = ((x_SF * form.std[0] + form.mean[0]) * 255 for x_SF in (task.train_x_SF, task.test_x_SF))
    assert sorted(train[:, 0].round().tolist()) == [20, 30, 40, 50, 60, 70, 80, 90]
    assert sorted(test[:, 0].round().tolist()) == [40, 60, 80, 100, 120, 140, 160, 180]


def test_tasks_come_back_from_their_recipes() -> None:
    for recipe in (
        {"name": "images", "path": "digits", "classes": [7, 2], "domain": "invert", "limit": 60},
        {"name": "images", "path": "digits", "mean": [0.25], "std": [0.5]},
        {"name": "episode", "path": "digits", "index": 3, "way": 2, "shot": 4, "num_query": 5, "split": "validation"},
    ):
        task = build_task(recipe)
        again = build_task(task.recipe)
        assert again.id == task.id
        assert again.instruction == task.instruction
        for name in ("train_x_SF", "train_y_S", "test_x_SF", "test_y_S"):
            assert torch.equal(getattr(again, name), getattr(task, name))


def test_networks_from_elsewhere_are_judged_on_inputs_as_they_expect_them() -> None:
    plain = build_task({"name": "images", "path": "digits"})
    theirs = build_task({"name": "images", "path": "digits", "mean": [0.25], "std": [0.5]})
    form, own = input_form(theirs.recipe), input_form(plain.recipe)
    assert form is not None
    assert own is not None
    assert (form.mean, form.std) == ((0.25,), (0.5,))
    pixels_SF = plain.train_x_SF * own.std[0] + own.mean[0]
    torch.testing.assert_close(theirs.train_x_SF, (pixels_SF - 0.25) / 0.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mean", "std"), [([0.5, 0.5], [0.5, 0.5]), ([0.5], [0.0]), ([0.5], [0.5, 0.5])])
def test_pixel_statistics_that_fit_no_image_are_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(TaskError, match="mean="):
        build_task({"name": "images", "path": "digits", "mean": mean, "std": std})


def test_classes_are_renumbered_and_limits_balanced() -> None:
    task = build_task({"name": "images", "path": "digits", "classes": [7, 2], "limit": 400, "test_limit": 100})
    assert task.instruction == "Which of 7, 2 is in the image?"
    assert task.train_y_S.bincount().tolist() == [40, 40]
    assert task.test_y_S.bincount().tolist() == [10, 10]
    whole = build_task({"name": "images", "path": "digits", "limit": 400})
    sevens = {tuple(row) for row in whole.train_x_SF[whole.train_y_S == 7].tolist()}
    assert all(tuple(row) in sevens for row in task.train_x_SF[task.train_y_S == 0].tolist())


@pytest.mark.parametrize("domain", ["plain", "rotate-30", "contrast-0.5"])
def test_tasks_of_some_classes_share_the_images_of_all(domain: str) -> None:
    recipe = {"name": "images", "path": "digits", "limit": 400, "domain": domain}
    whole = build_task(recipe)
    # The recipe that a zoo draws names what is not given; the task's own leaves it out.
    parts = [build_task({**recipe, "size": None, "classes": classes}) for classes in ([7, 2], [2, 7, 5], [0])]
    parts += [build_task(part.recipe) for part in parts]
    for part in parts:
        classes = torch.tensor(part.recipe["classes"])
        for mine, my_y_S, theirs, their_y_S in (
            (part.train_inputs, part.train_y_S, whole.train_inputs, whole.train_y_S),
            (part.test_inputs, part.test_y_S, whole.test_inputs, whole.test_y_S),
        ):
            assert mine.x_XF is theirs.x_XF
            rows_S = torch.isin(their_y_S, classes)
            assert torch.equal(mine[:], theirs[:][rows_S])
            assert torch.equal(classes[my_y_S], their_y_S[rows_S])


def test_inputs_made_in_blocks_are_those_made_at_once() -> None:
    """More images than a block holds."""
    data = load_digits_images()
    many_SCHW = data.x_SCHW.repeat(3, 1, 1, 1)
    mean, std = torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), 0.4)
    for domain in ("plain", "rotate-30", "contrast-0.5", "scale-0.75"):
        at_once_SCHW = (apply_domain(many_SCHW.float() / 255, domain) - mean) / std
        assert torch.equal(network_inputs(many_SCHW, domain, (mean, std)), at_once_SCHW.flatten(1))


def test_episodes_of_different_splits_share_no_class() -> None:
    seen: dict[str, set[tuple[float, ...]]] = {}
    for split in ("train", "validation", "test"):
        task = build_task(
            {"name": "episode", "path": "digits", "index": 0, "way": 2, "shot": 20, "num_query": 40, "split": split}
        )
        assert task.num_classes == 2
        assert len(task.train_y_S) == 40
        assert len(task.test_y_S) == 80
        seen[split] = {tuple(row) for row in torch.cat([task.train_x_SF, task.test_x_SF]).tolist()}
        assert len(seen[split]) == 120
    assert not seen["train"] & seen["validation"] | seen["train"] & seen["test"] | seen["validation"] & seen["test"]


def test_domains_change_pixels_not_labels() -> None:
    plain = build_task({"name": "images", "path": "digits"})
    inverted = build_task({"name": "images", "path": "digits", "domain": "invert"})
    assert torch.equal(plain.train_y_S, inverted.train_y_S)
    assert not torch.equal(plain.train_x_SF, inverted.train_x_SF)
    assert inverted.instruction.endswith("seen under invert?")


def test_digits_are_enlarged_to_the_size_of_other_data() -> None:
    task = build_task({"name": "images", "path": "digits", "size": 28})
    assert task.train_x_SF.shape[1] == 784
    small = torch.nn.functional.interpolate(task.train_x_SF.view(-1, 1, 28, 28), size=(8, 8), mode="area").flatten(1)
    plain = build_task({"name": "images", "path": "digits"}).train_x_SF
    assert float(torch.corrcoef(torch.stack([small.flatten(), plain.flatten()]))[0, 1]) > 0.95


def test_what_is_not_there_is_named() -> None:
    for recipe, message in (
        ({"name": "images", "path": "nothing.parquet"}, r"nothing\.parquet"),
        ({"name": "images", "path": "digits", "channels": 3}, "images are grey"),
        ({"name": "images", "path": "digits", "classes": [10]}, "from 0 to 9"),
        ({"name": "images", "path": "digits", "domain": "blur"}, "blur"),
        ({"name": "episode", "path": "digits", "index": 0, "way": 9}, "9"),
        ({"name": "episode", "path": "digits", "index": 0, "split": "seen"}, "split=seen: give one of train"),
    ):
        with pytest.raises(TaskError, match=message):
            build_task(recipe)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_real_mnist() -> None:
    task = build_task(
        {
            "name": "images",
            "path": str(SHARED / "mnist-train.parquet"),
            "test_path": str(SHARED / "mnist-test.parquet"),
            "limit": 1000,
        }
    )
    assert task.train_x_SF.shape == (1000, 784)
    assert task.test_x_SF.shape == (10_000, 784)
    assert task.train_y_S.bincount().tolist() == [100] * 10
