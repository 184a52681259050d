"""Random rotations: orthogonal, undone exactly, keyed, and good for heavy tails."""

from __future__ import annotations

import pytest
import torch

from raywgen.weights import WeightsError
from raywgen.weights.rotation import hadamard, rotate, rotate_back


@pytest.mark.parametrize("size", [1, 2, 8, 256])
def test_hadamard_is_orthogonal_symmetric_and_flat(size: int) -> None:
    matrix = hadamard(size).double()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.t())
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_rotation_keeps_lengths_and_is_undone() -> None:
    rows_NK = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rotated_NK = rotate(rows_NK, key=3)
    torch.testing.assert_close(rotated_NK.norm(dim=1), rows_NK.norm(dim=1))
    torch.testing.assert_close(rotate_back(rotated_NK, key=3), rows_NK, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rotate_back(rotated_NK, key=4), rows_NK, atol=0.1)


def test_equal_rows_are_turned_differently() -> None:
    rotated_NK = rotate(torch.ones(2, 64), key=0)
    assert not torch.allclose(rotated_NK[0], rotated_NK[1])


def test_heavy_tails_become_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_NK = torch.randn(200, 256, generator=generator) * (torch.rand(200, 256, generator=generator) < 0.1)
    kurtosis = [float(x.pow(4).mean() / x.square().mean() ** 2) for x in (rows_NK, rotate(rows_NK, key=1))]
    # A Gaussian times a coin of 0.1 has 3 / 0.1; a sum of 256 such terms 3 + 27 / 256, scattered by the rows' energies.
    assert kurtosis[0] > 25
    assert kurtosis[1] == pytest.approx(3.1, abs=0.3)


def test_other_lengths_are_refused() -> None:
    with pytest.raises(WeightsError, match="power of two"):
        rotate(torch.zeros(1, 12), key=0)
