from __future__ import annotations

import torch

from raywgen.nn.precision import autocast, resolved
from raywgen.nn.quantisers.kmeans import nearest_code


def test_auto_is_one_of_the_two_and_others_are_as_asked() -> None:
    assert resolved("auto") in ("bf16", "fp32")
    assert [resolved("bf16"), resolved("fp32")] == ["bf16", "fp32"]


def test_products_are_bfloat16_only_where_that_was_asked_for() -> None:
    x = torch.randn(4, 4)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with autocast(precision):
            assert (x @ x).dtype == dtype


def test_codes_are_the_nearest_ones_in_either() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors_NK, codebook_VK = torch.randn(500, 16, generator=generator), torch.randn(256, 16, generator=generator)
    expected_N = torch.cdist(vectors_NK.double(), codebook_VK.double()).argmin(dim=1)
    with autocast("bf16"):
        assert torch.equal(nearest_code(vectors_NK, codebook_VK), expected_N)
