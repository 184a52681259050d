from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from raywgen.tasks.base import TaskError
from raywgen.tasks.domains import DOMAINS, apply_domain
from raywgen.tasks.images import load_digits_images

NAMES = ["plain", "invert", "rotate-30", "rotate--45.5", "rotate-180", "contrast-0.5", "contrast-2", "scale-0.75"]


def images(num: int = 4, channels: int = 3, height: int = 12, width: int = 12) -> torch.Tensor:
    return torch.rand(num, channels, height, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", [*NAMES, "scale-1.5", "scale-1"])
@pytest.mark.parametrize("shape", [(12, 12), (9, 14)])
def test_a_domain_keeps_shape_range_and_its_input(name: str, shape: tuple[int, int]) -> None:
    x_SCHW = images(height=shape[0], width=shape[1])
    before = x_SCHW.clone()
    seen = apply_domain(x_SCHW, name)
    assert (seen.shape, seen.dtype) == (x_SCHW.shape, x_SCHW.dtype)
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
    seen.zero_()
    assert torch.equal(x_SCHW, before)


@pytest.mark.parametrize("name", NAMES)
def test_each_image_is_treated_for_itself(name: str) -> None:
    x_SCHW = images()
    torch.testing.assert_close(apply_domain(x_SCHW, name)[1:2], apply_domain(x_SCHW[1:2], name))


def test_plain_and_invert() -> None:
    x_SCHW = images()
    assert torch.equal(apply_domain(x_SCHW, "plain"), x_SCHW)
    assert torch.equal(apply_domain(x_SCHW, "invert"), 1 - x_SCHW)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (-90, 3), (180, 2), (270, 3), (360, 0)])
def test_quarter_turns_are_exact_and_counter_clockwise(degrees: int, turns: int) -> None:
    x_SCHW = images()
    assert torch.equal(apply_domain(x_SCHW, f"rotate-{degrees}"), torch.rot90(x_SCHW, turns, (-2, -1)))
    # Interpolated angles pass into the exact ones without a jump.
    torch.testing.assert_close(
        apply_domain(x_SCHW, f"rotate-{degrees + 1e-4}"), torch.rot90(x_SCHW, turns, (-2, -1)), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("degrees", [17.0, 45.0, -60.0, 90.0])
@pytest.mark.parametrize("shape", [(24, 24), (18, 30)])
def test_rotation_is_pillows_inside_the_image(degrees: float, shape: tuple[int, int]) -> None:
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    smooth = (0.5 + 0.25 * np.sin(rows / 4) + 0.25 * np.cos(columns / 3)).astype(np.float32)
    seen = apply_domain(torch.from_numpy(smooth)[None, None], f"rotate-{degrees}")[0, 0].numpy()
    expected = np.asarray(Image.fromarray(smooth).rotate(degrees, Image.Resampling.BILINEAR))
    inside = np.hypot(rows - (height - 1) / 2, columns - (width - 1) / 2) < min(shape) / 2 - 1.5
    np.testing.assert_allclose(seen[inside], expected[inside], atol=2e-3)


def test_corners_that_come_in_look_like_the_edge() -> None:
    white = torch.ones(1, 1, 9, 9)
    white[..., 4, 4] = 0
    for name in ("rotate-45", "scale-0.5"):
        seen = apply_domain(white, name)
        assert seen[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [1, 1, 1, 1]
        assert float(seen[0, 0, 4, 4]) < 1


def test_contrast_is_about_the_mean_of_each_image() -> None:
    x_SCHW = images()
    mean = x_SCHW.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(apply_domain(x_SCHW, "contrast-0.25"), mean + 0.25 * (x_SCHW - mean))
    strong = apply_domain(x_SCHW, "contrast-3")
    torch.testing.assert_close(strong, (mean + 3 * (x_SCHW - mean)).clamp(0, 1))
    assert float(strong.min()) == 0


@pytest.mark.parametrize("factor", [0.5, 0.75, 2.0])
def test_scale_zooms_about_the_centre(factor: float) -> None:
    side, radius = 64, 12.0
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    disc = torch.from_numpy((np.hypot(rows, columns) < radius).astype(np.float32))[None, None]
    seen = apply_domain(disc, f"scale-{factor}")[0, 0].double()
    assert float(seen.sum()) == pytest.approx(math.pi * (radius * factor) ** 2, rel=0.03)
    assert float((seen * torch.from_numpy(rows)).sum() / seen.sum()) == pytest.approx(0, abs=0.02)
    assert float((seen * torch.from_numpy(columns)).sum() / seen.sum()) == pytest.approx(0, abs=0.02)


def test_domains_change_real_digits() -> None:
    x_SCHW = load_digits_images().x_SCHW[:200].float() / 255
    for name in NAMES[1:]:
        changed = (apply_domain(x_SCHW, name) - x_SCHW).abs().mean()
        assert float(changed) > 0.02, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotat-30", "did you mean 'rotate-30'"),
        ("", "did you mean"),
        ("rotate", "needs a number; write for instance 'rotate-30'"),
        ("rotate-", "needs a number"),
        ("rotate-nan", "needs a number"),
        ("rotate-inf", "needs a number"),
        ("scale-0", "needs a number above 0"),
        ("contrast--1", "needs a number above 0"),
        ("contrast-much", "write for instance 'contrast-0.5'"),
        ("invert-2", "takes no number; write 'invert'"),
        ("plain-", "takes no number; write 'plain'"),
    ],
)
def test_names_of_no_domain_are_refused(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        apply_domain(images(), name)


def test_each_kinds_example_is_a_name() -> None:
    for kind, domain in DOMAINS.items():
        assert apply_domain(images(), domain.example or kind).shape == images().shape


@pytest.mark.parametrize(
    ("x_SCHW", "message"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "divide uint8 by 255"),
        (torch.zeros(1, 4, 4), "give floating point"),
        (torch.zeros(0, 1, 4, 4), "give floating point"),
        (torch.full((1, 1, 4, 4), 1.5), "normalise only afterwards"),
        (torch.full((1, 1, 4, 4), -0.1), "give pixels in"),
        (torch.full((1, 1, 4, 4), math.nan), "give pixels in"),
    ],
)
def test_images_of_another_kind_are_refused(x_SCHW: torch.Tensor, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        apply_domain(x_SCHW, "invert")
