"""Truncation and guidance against their definitions.

Shape legend: X positions, V codes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raywgen.nn.sampling import guided, truncated


@pytest.fixture(scope="module")
def log_p_XV() -> Tensor:
    return (3 * torch.randn(50, 12, generator=torch.Generator().manual_seed(0))).log_softmax(dim=-1)


def test_by_default_nothing_is_truncated(log_p_XV: Tensor) -> None:
    assert truncated(log_p_XV) is log_p_XV
    assert truncated(log_p_XV, top_k=12) is log_p_XV


@pytest.mark.parametrize("top_k", [1, 3, 11])
def test_top_k_keeps_the_likeliest(log_p_XV: Tensor, top_k: int) -> None:
    kept = truncated(log_p_XV, top_k=top_k)
    for row_V, kept_V in zip(log_p_XV, kept, strict=True):
        likeliest = set(row_V.argsort(descending=True)[:top_k].tolist())
        assert {v for v in range(12) if kept_V[v] > -torch.inf} == likeliest
        assert torch.equal(kept_V[list(likeliest)], row_V[list(likeliest)])


def test_ties_leave_no_more_than_top_k() -> None:
    assert int(truncated(torch.zeros(1, 6), top_k=2).isfinite().sum()) == 2


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_of_that_probability(log_p_XV: Tensor, top_p: float) -> None:
    kept = truncated(log_p_XV, top_p=top_p)
    for row_V, kept_V in zip(log_p_XV.double(), kept, strict=True):
        p_V, order = row_V.exp().sort(descending=True)
        num, held = 0, 0.0
        while num == 0 or held < top_p:
            held += float(p_V[num])
            num += 1
        assert {v for v in range(12) if kept_V[v] > -torch.inf} == set(order[:num].tolist())


def test_top_p_counts_among_what_top_k_left() -> None:
    log_p = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert torch.isfinite(truncated(log_p, top_p=0.65)).tolist() == [[True, True, False, False]]
    # Of two codes the first holds 4/7 and the share below that is met by it alone.
    assert torch.isfinite(truncated(log_p, top_k=2, top_p=0.55)).tolist() == [[True, False, False, False]]


def test_guidance_is_linear_in_log_probabilities(log_p_XV: Tensor) -> None:
    without = log_p_XV.flip(0)
    assert torch.equal(guided(log_p_XV, without, 0.0), without)
    torch.testing.assert_close(guided(log_p_XV, without, 1.0), log_p_XV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided(log_p_XV, without, 3.0), 3 * log_p_XV - 2 * without, rtol=1e-5, atol=1e-5)
